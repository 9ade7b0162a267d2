"""Mistakes in the YAML, the model folder and the data: one clear message before training, and no run folder.

The cases are named after the 58 trials of mistral-finetune in ../shared/golden/expected/train/errors.json.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import train
from finetune.args import known_settings
from model.errors import UserError
from tests.end_to_end.kill_runs import ForkedRun
from tests.support import run_refused
from tests.support.checkpoints import SMALL, make_tiny_adapter, make_tiny_checkpoint
from tests.support.forked import run_forked
from tests.support.golden import GOLDEN
from tests.support.run_trajectories import INPUTS, ROOT, short_run

SHAPES = SMALL | {"n_layers": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), **SHAPES)


def valid_run(folder: Path, model: Path) -> dict:
    """Write `model`, `one.jsonl` (one row) and `train.jsonl` to `folder`; return the settings of a valid run."""
    rows = (INPUTS / "train_icd.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "one.jsonl").write_text(rows[0] + "\n", encoding="utf-8")
    return short_run(folder, model, rows[:6])


@pytest.fixture
def settings(model, tmp_path, monkeypatch) -> dict:
    """The settings of a valid run in the current folder."""
    monkeypatch.chdir(tmp_path)
    return valid_run(tmp_path, model)


def merged(settings: dict, changes: dict) -> dict:
    """Return `settings` with some keys changed, at any depth; "-" removes a key."""
    result = dict(settings)
    for key, value in changes.items():
        if value == "-":
            del result[key]
        else:
            result[key] = merged(settings.get(key, {}), value) if isinstance(value, dict) else value
    return result


def write_config(settings: dict) -> Path:
    Path("config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return Path("config.yaml").resolve()


def refusal(settings: dict) -> str:
    """Return the error message of a run; no run folder may exist afterwards."""
    with pytest.raises(UserError) as error:
        train.train(str(write_config(settings)))
    assert not Path("run").exists()
    return str(error.value)


# --- Settings

BAD_SETTINGS = {
    "lora_off_save_adapters_default": (
        {"lora": {"enable": False}},
        "`save_adapters` is true but `lora.enable` is false",
    ),
    "no_eval_false_without_eval_data": (
        {"no_eval": False, "data": {"eval_instruct_data": "-"}},
        "`no_eval` is false but `data.eval_instruct_data` is empty",
    ),
    "model_missing_folder": ({"model_id_or_path": "/nonexistent"}, "the folder /nonexistent does not exist"),
    "yaml_unknown_field": ({"nonsense": 1}, "`nonsense` is not a known setting"),
    "yaml_unknown_nested_field": ({"optim": {"nonsense": 1}}, "`optim.nonsense` is not a known setting"),
    "yaml_text_for_number": ({"max_steps": "abc"}, "`max_steps` is 'abc'; expected a whole number"),
    "yaml_missing_run_dir": ({"run_dir": "-"}, "`run_dir` is missing"),
    "yaml_missing_data": ({"data": "-"}, "`data` is missing"),
    "yaml_missing_model": ({"model_id_or_path": "-"}, "`model_id_or_path` is missing"),
    "yaml_lora_rank_0": ({"lora": {"rank": 0}}, "`lora.rank` is 0; expected a whole number of at least 1"),
    "yaml_shuffle_false_chunk_default": (
        {"data": {"instruct": {"shuffle": False}}},
        "`data.instruct.dynamic_chunk_fn_call` needs `data.instruct.shuffle: true`",
    ),
    "yaml_num_ckpt_keep_0": ({"num_ckpt_keep": 0}, "`num_ckpt_keep` is 0; expected a whole number of at least 1"),
    "yaml_num_microbatches_0": ({"num_microbatches": 0}, "`num_microbatches` is 0; expected a whole number"),
    "yaml_max_steps_0": ({"max_steps": 0}, "`max_steps` is 0; expected a whole number of at least 1"),
    "yaml_seq_len_0": ({"seq_len": 0}, "`seq_len` is 0; expected a whole number of at least 1"),
    "yaml_seq_len_negative": ({"seq_len": -5}, "`seq_len` is -5; expected a whole number of at least 1"),
    "yaml_batch_size_0": ({"batch_size": 0}, "`batch_size` is 0; expected a whole number of at least 1"),
    "yaml_log_freq_0": ({"log_freq": 0}, "`log_freq` is 0; expected a whole number of at least 1"),
    "yaml_lr_negative": ({"optim": {"lr": -1.0}}, "`optim.lr` is -1.0"),
    "yaml_pct_start_2": ({"optim": {"pct_start": 2.0}}, "`optim.pct_start` is 2.0"),
    "yaml_seed_negative": ({"seed": -1}, "`seed` is -1; expected a whole number between 0 and 4294967295"),
    "yaml_empty_data": ({"data": {"instruct_data": ""}}, "`data.instruct_data` and `data.data` are both empty"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_invalid_setting_is_named(name, settings):
    changes, expected = BAD_SETTINGS[name]
    assert expected in refusal(merged(settings, changes))


def test_all_invalid_settings_are_named_in_one_message(settings):
    contradictory = {
        "lora": {"enable": False},
        "no_eval": False,
        "data": {"eval_instruct_data": ""},
        "optim": {"pct_start": -0.1},
        "seq_len": 0,
        "batch_size": 0,
        "log_freq": 0,
        "seed": 2**32,
        "model_id_or_path": "nowhere",
        "typo": 1,
    }
    message = refusal(merged(settings, contradictory))
    for part in (
        "save_adapters",
        "no_eval",
        "pct_start",
        "seq_len",
        "batch_size",
        "log_freq",
        "seed",
        "nowhere",
        "typo",
    ):
        assert part in message
    *lines, known_keys = message.splitlines()
    assert len(lines) == 1 + 9 and known_keys.startswith("Known keys: ")


# --- Model folder


def edit_params(**changes) -> None:
    path = Path("model/params.json")
    params = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in params.items() if v != "-"}), encoding="utf-8")


def edit_weights(change) -> None:
    tensors = load_file("model/consolidated.safetensors")
    change(tensors)
    save_file(tensors, "model/consolidated.safetensors")


def as_pth(keep_safetensors: bool) -> None:
    torch.save(load_file("model/consolidated.safetensors"), "model/consolidated.00.pth")
    if not keep_safetensors:
        Path("model/consolidated.safetensors").unlink()


def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def reshaped(name: str, *shape: int):
    return lambda: edit_weights(lambda tensors: tensors.update({name: torch.zeros(shape)}))


def without(name: str):
    return lambda: edit_weights(lambda tensors: tensors.pop(name))


BAD_MODELS = {
    "model_vocab_32000": (lambda: edit_params(vocab_size=32000), ["32000", "python -m utils.extend_model_vocab"]),
    "model_vocab_1000": (
        lambda: make_tiny_checkpoint(Path("model"), **SHAPES, vocab_size=1000),
        ["1000", "32768"],
    ),
    "model_vocab_32769_is_tekken": (
        lambda: edit_params(vocab_size=32769),
        ["output.weight is [32768, 16], expected [32769, 16]"],
    ),
    "model_both_files": (lambda: as_pth(keep_safetensors=True), ["consolidated.safetensors and consolidated.00.pth"]),
    "model_no_file": (lambda: Path("model/consolidated.safetensors").unlink(), ["contains no weights"]),
    "model_no_params": (lambda: Path("model/params.json").unlink(), ["model/params.json does not exist"]),
    "params_missing_dim": (lambda: edit_params(dim="-"), ["model/params.json lacks dim"]),
    "params_moe_extra_key": (
        lambda: edit_params(moe={"num_experts": 4, "num_experts_per_tok": 2, "x": 1}),
        ["model/params.json: `moe` is", "num_experts_per_tok"],
    ),
    "weights_missing_norm": (without("norm.weight"), ["norm.weight is missing"]),
    "weights_missing_wq": (without("layers.0.attention.wq.weight"), ["layers.0.attention.wq.weight is missing"]),
    "weights_extra_key": (reshaped("extra.weight", 2), ["extra.weight is not part of the model"]),
    "weights_extra_layer_key_lora": (
        reshaped("layers.0.attention.wq.extra", 2),
        ["layers.0.attention.wq.extra is not part of the model"],
    ),
    "weights_wrong_shape_norm": (reshaped("norm.weight", 17), ["norm.weight is [17], expected [16]"]),
    "weights_wrong_shape_wq": (
        reshaped("layers.0.attention.wq.weight", 17, 16),
        ["layers.0.attention.wq.weight is [17, 16], expected [16, 16]"],
    ),
    # not among the trials
    "truncated_safetensors": (
        lambda: truncate("model/consolidated.safetensors"),
        ["consolidated.safetensors", "corrupt"],
    ),
    "truncated_pth": (
        lambda: (as_pth(keep_safetensors=False), truncate("model/consolidated.00.pth")),
        ["consolidated.00.pth", "corrupt"],
    ),
    "params_no_json": (lambda: Path("model/params.json").write_text("{"), ["model/params.json is not valid JSON"]),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_invalid_model_folder_is_named(name, settings):
    corrupt, parts = BAD_MODELS[name]
    corrupt()
    message = refusal(settings)
    assert all(part in message for part in parts), message


def test_missing_weights_are_named_without_lora(settings):
    """weights_missing_norm_lora_off"""
    without("norm.weight")()
    assert "norm.weight is missing" in refusal(settings | {"lora": {"enable": False}, "save_adapters": False})


def bad_adapter(rank=2, params=None):
    adapter = Path("adapter/lora.safetensors")
    make_tiny_adapter(Path("model"), adapter, rank=rank)
    if params is not None:
        Path("adapter/params.json").write_text(params, encoding="utf-8")


BAD_ADAPTERS = {
    "missing": (lambda: None, "adapter does not exist"),
    "truncated": (lambda: (bad_adapter(), truncate("adapter/lora.safetensors")), "corrupt"),
    "other rank": (lambda: bad_adapter(rank=3), "lora_A.weight is [3, 16], expected [2, 16]"),
    "other scaling": (lambda: bad_adapter(params='{"lora": {"scaling": 4.0}}'), "trained with `lora.scaling: 4.0`"),
    "params not json": (lambda: bad_adapter(params="{"), "adapter/params.json is not valid JSON"),
    "params not an object": (lambda: bad_adapter(params="[]"), "adapter/params.json must contain a JSON object"),
    "no adapter": (lambda: shutil.copytree("model", "adapter"), "adapter/lora.safetensors does not exist"),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_invalid_adapter_is_named(name, settings):
    corrupt, expected = BAD_ADAPTERS[name]
    corrupt()
    assert expected in refusal(merged(settings, {"lora": {"from_adapter": "adapter"}}))


# --- Data


def file_with(*rows: str) -> None:
    Path("bad.jsonl").write_text("\n".join(rows), encoding="utf-8")


ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
UNTRAINED = ROW.replace('"b"', '"b", "weight": 0')
BAD_DATA = {
    "bad_line_in_training_file": ([ROW, '{"messages": ', ROW], "The data in line 2 of dataset bad.jsonl"),
    "empty file": ([], "bad.jsonl contains no rows"),
    "blank line": ([ROW, "", ROW], "The data in line 2 of dataset bad.jsonl"),
    "nothing to train on": ([UNTRAINED, UNTRAINED], "bad.jsonl"),
    "last message is the user's": ([ROW.replace("assistant", "user")], "The data in line 1 of dataset bad.jsonl"),
    "not an object": (["3"], "The data in line 1 of dataset bad.jsonl"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_invalid_training_data_is_named(name, settings):
    rows, expected = BAD_DATA[name]
    file_with(*rows)
    assert expected in refusal(merged(settings, {"data": {"instruct_data": "bad.jsonl"}}))


@pytest.mark.parametrize("name", BAD_DATA)
def test_invalid_evaluation_data_is_named_before_training(name, settings):
    rows, _ = BAD_DATA[name]
    file_with(*rows)
    message = refusal(merged(settings, {"no_eval": False, "data": {"eval_instruct_data": "bad.jsonl"}}))
    assert "bad.jsonl" in message or "`data.eval_instruct_data` has nothing to evaluate" in message


@pytest.mark.parametrize("key", ["instruct_data", "data", "eval_instruct_data"])
@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "train.jsonl:0", "train.jsonl,train.jsonl", "a:b:c", "empty_folder"]
)
def test_invalid_source_is_quoted_with_its_key(key, source, settings):
    Path("empty_folder").mkdir()
    message = refusal(merged(settings, {"data": {key: source}}))
    assert f"data.{key}" in message and source.partition(":")[0].partition(",")[0] in message


# --- Valid runs


def use_pth() -> None:
    as_pth(keep_safetensors=False)


def float32_weights() -> None:
    edit_weights(lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))


def parallel_calls() -> None:
    shutil.copy(INPUTS / "function_calling_parallel.jsonl", "train.jsonl")


GOOD = {
    "baseline_ok": (None, {}),
    "model_pth_only_ok": (use_pth, {}),
    "params_missing_rope_theta_ok": (lambda: edit_params(rope_theta="-"), {}),
    "params_extra_key_ok": (lambda: edit_params(extra=1), {}),
    "weights_float32_file_ok": (float32_weights, {}),
    "yaml_div_factor_in_upstream": (None, {"optim": {"div_factor": 10.0}}),
    "yaml_lora_null": (None, {"lora": None}),  # all keys of the block are commented out
    "yaml_lr_as_text": (None, {"optim": {"lr": "1e-3"}}),
    "yaml_wandb_project_empty": (None, {"wandb": {"project": ""}}),
    "yaml_world_size_given": (None, {"world_size": 1}),
    "yaml_max_steps_1": (None, {"max_steps": 1}),
    "yaml_max_steps_1_pct_default": (None, {"max_steps": 1, "optim": {"pct_start": "-"}}),
    "yaml_seq_len_1": (None, {"seq_len": 1}),
    "parallel_calls_default_chunking": (parallel_calls, {}),
}


@pytest.mark.parametrize("name", GOOD)
def test_valid_run_trains(name, settings):
    prepare, changes = GOOD[name]
    if prepare:
        prepare()
    settings = merged(settings, changes)
    train.train(str(write_config(settings)))
    steps = settings["max_steps"]
    assert len(Path("run/metrics.train.jsonl").read_text(encoding="utf-8").splitlines()) == steps
    assert Path(f"run/checkpoints/checkpoint_{steps:06d}/consolidated/lora.safetensors").is_file()


ELSEWHERE = {  # cases with a separate test
    "weights_missing_norm_lora_off",
    "yaml_mlflow_uri",  # test_args.py: a tracker that is not installed
    "run_dir_exists_torchrun",
    "run_dir_exists_no_torchrun",
    "eval_one_line_two_ranks",  # test_training.py: one_row
    "train_one_line_two_ranks",
    "seq_len_above_rope_table",  # test_model.py
}
if GOLDEN:

    def test_all_trials_of_mistral_finetune_are_covered():
        trials = json.loads((GOLDEN / "expected/train/errors.json").read_text(encoding="utf-8"))
        assert len(trials) == 58
        assert trials.keys() <= {*BAD_SETTINGS, *BAD_MODELS, *BAD_DATA, *GOOD, *ELSEWHERE}


# --- Command line


def absolute(settings: dict, tmp_path: Path) -> dict:
    """Return `settings` with absolute paths."""
    data = {key: str(tmp_path / v) if isinstance(v, str) else v for key, v in settings["data"].items()}
    return settings | {"data": data, **{key: str(tmp_path / settings[key]) for key in ("model_id_or_path", "run_dir")}}


def test_existing_run_folder_is_refused_and_not_changed(settings):
    """run_dir_exists_torchrun, run_dir_exists_no_torchrun"""
    Path("run").mkdir()
    Path("run/args.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="The run folder run already exists"):
        train.train(str(write_config(settings)))
    assert [path.name for path in Path("run").iterdir()] == ["args.yaml"]
    assert Path("run/args.yaml").read_text(encoding="utf-8") == "mine"


def test_command_prints_the_message_once_and_fails(settings, tmp_path):
    edit_params(vocab_size=32000)
    done = run_forked(train, write_config(absolute(settings, tmp_path)))
    assert done.returncode == 1
    assert done.stderr.startswith("error: The model in ") and "extend_model_vocab" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("run").exists()


def test_invalid_yaml_is_reported_with_its_line(tmp_path):
    (tmp_path / "config.yaml").write_text("data: [1,\nmodel: {", encoding="utf-8")
    done = run_forked(train, tmp_path / "config.yaml")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/config.yaml is not valid YAML")
    assert "line 2" in done.stderr and "Traceback" not in done.stderr


TWO_RANKS = {
    # Found by both ranks.
    "bad settings": (None, {"seq_len": 0, "lora": {"rank": 0}}, ["`seq_len` is 0", "`lora.rank` is 0"]),
    # Found by the second rank only.
    "train_one_line_two_ranks": (
        None,
        {"data": {"instruct_data": "one.jsonl"}},
        ["one.jsonl", "process 1", "2 processes"],
    ),
    "bad second row": (
        lambda: file_with(ROW, "{", ROW),
        {"data": {"instruct_data": "bad.jsonl"}},
        ["The data in line 2 of dataset", "bad.jsonl"],
    ),
    "bad second row to evaluate": (
        lambda: file_with(ROW, "{", ROW),
        {"no_eval": False, "data": {"eval_instruct_data": "bad.jsonl"}},
        ["The data in line 2 of dataset", "bad.jsonl"],
    ),
}


class RefusedRuns(ForkedRun):
    """Runs that must be refused, one after the other, in two processes."""

    def __init__(self, configs: list[Path]) -> None:
        self._configs = configs
        super().__init__(configs[0], 2)

    def _command(self, config: Path) -> None:
        run_refused.main([str(config) for config in self._configs])


@pytest.fixture(scope="module")
def two_rank_folders(model, tmp_path_factory) -> tuple[dict[str, Path], str]:
    """One folder per case, and the output of one process group that started all runs."""
    folders = {name: tmp_path_factory.mktemp("two_ranks") for name in TWO_RANKS}
    configs = []
    for name, (prepare, changes, _) in TWO_RANKS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folders[name])
            settings = valid_run(folders[name], model)
            if prepare:
                prepare()
            configs.append(write_config(absolute(merged(settings, changes), folders[name])))
    run = RefusedRuns(configs)
    assert run.wait() == [0, 0], run.log
    return folders, run.log


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_end_together_with_one_message(name, two_rank_folders):
    folders, output = two_rank_folders
    endings = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    (_, _, message), (_, _, code) = sorted(entry for entry in endings if entry[0] == f"{folders[name]}/config.yaml")
    assert code == 1, "the second rank ends without a message"
    assert all(message.count(part) == 1 for part in TWO_RANKS[name][2]), message
    assert not (folders[name] / "run").exists()


def test_invalid_row_found_while_training_ends_both_ranks_and_keeps_the_checkpoints(settings, tmp_path):
    rows = (INPUTS / "train_icd.jsonl").read_text(encoding="utf-8").splitlines()
    file_with(*rows[:21] * 3, "{")  # the second rank's last row, several steps after the first checkpoint
    in_order = {"instruct_data": "bad.jsonl", "instruct": {"shuffle": False, "dynamic_chunk_fn_call": False}}
    changes = {"data": in_order, "seq_len": 512, "max_steps": 50, "ckpt_freq": 2, "num_ckpt_keep": None}
    run = ForkedRun(write_config(absolute(merged(settings, changes), tmp_path)), 2)
    assert run.wait() == [1, 1] and "Traceback" not in run.log
    assert run.log.count("The data in line 64 of dataset") == 1
    assert Path("run/checkpoints/checkpoint_000002/consolidated/lora.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 1, "give one training YAML: CONFIG.yaml or --train_yaml CONFIG.yaml"),
        (("a.yaml", "--train_yaml", "a.yaml"), 1, "give one training YAML"),
        (("--config", "a.yaml", "--train_yaml", "config.yaml"), 1, "both name the training YAML; give one of them."),
        (("a.yaml", "--wandb.key=0123456789"), 1, "unexpected argument --wandb.key; write wandb.key=VALUE"),
        (("a.yaml", "b.yaml"), 1, "unexpected argument b.yaml; settings are written as KEY=VALUE"),
        (("a.yaml", "--max_steps", "3"), 1, "unexpected argument --max_steps; write max_steps=VALUE"),
        (("a.yaml", "--learning-rate=1e-4"), 1, "unexpected argument --learning_rate; write optim.lr=VALUE"),
        (("config.yaml", "-", "seq_len=8"), 1, "unexpected argument -"),
        (("--config", "a.yaml", "seq_len=8"), 1, "The configuration a.yaml does not exist"),
        (("--train_yaml", "a.yaml", "seq_len=8"), 1, "The configuration a.yaml does not exist"),
        (("config.yaml", "=3"), 1, "`=3` is not a setting; expected KEY=VALUE"),
        (("config.yaml", "lora.targets=[wq"), 1, "`lora.targets=...` cannot be used: it is not valid YAML."),
        (("config.yaml", "learning_rate=1e-4"), 1, "write `optim.lr: 1e-4`"),
        (("config.yaml", "optim.lr=fast"), 1, "`optim.lr` is 'fast'; expected a number of at least 0"),
    ],
)
def test_a_wrong_command_line_is_explained(settings, run_command, arguments, code, message):
    write_config(settings)
    returned, output = run_command(train, *arguments)
    assert returned == code and message in output and "0123456789" not in output
    assert not Path("run").exists()


def test_arguments_replace_settings_and_are_recorded(settings, run_command):
    write_config(settings)
    arguments = (
        "run_dir=other",
        "optim.lr=2e-3",
        "lora.targets=[q_proj, lm_head]",
        "epochs=0.5",
        "data={shuffle: true}",
    )
    code, output = run_command(train, "config.yaml", *arguments)
    assert code == 0, output
    recorded = yaml.safe_load(Path("other/args.yaml").read_text())
    assert recorded["optim"]["lr"] == 2e-3 and recorded["optim"]["pct_start"] == settings["optim"]["pct_start"]
    assert recorded["lora"] | {"targets": ["wq", "output"], "rank": settings["lora"]["rank"]} == recorded["lora"]
    assert recorded["data"]["shuffle"] and recorded["data"]["instruct_data"] == "train.jsonl"
    assert not Path("run").exists()


def test_help_lists_every_setting_without_loading_torch():
    code = (
        "import runpy, sys; sys.argv = ['train', '--help']\n"
        "try:\n    runpy.run_module('train', run_name='__main__')\n"
        "except SystemExit as stop:\n    sys.exit(stop.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[CONFIG.yaml] [KEY=VALUE ...]" in done.stdout
    for key, setting in known_settings().items():
        assert f"\n{'' if setting.is_block else '  '}{key}: " in done.stdout
    assert "  optim.lr: 0.0001\n      highest learning rate" in done.stdout
