"""Reading the training YAML: conversions, and one message with all problems."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune.args import OptimArgs, TrainArgs, known_settings, load_train_args
from finetune.data.args import Source, parse_sources
from finetune.monitoring.args import WandbArgs
from finetune.run_dir import create_run_dir
from model import hf_format
from model.args import BLOCK_LINEARS, HF_LINEARS
from model.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _folder_with_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    for name in ("train", "eval", "texts"):
        Path(f"{name}.jsonl").write_text("{}\n", encoding="utf-8")


BASE: dict[str, Any] = {
    "model_id_or_path": "model",
    "run_dir": "runs/first",
    "data": {"instruct_data": "train.jsonl"},
}


def load(content: str | dict[str, Any], *overrides: str) -> TrainArgs:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    Path("config.yaml").write_text(text, encoding="utf-8")
    return load_train_args(Path("config.yaml"), overrides)


def problems(**keys: Any) -> list[str]:
    """Return the lines of the message for BASE with these keys."""
    try:
        load(BASE | keys)
    except UserError as error:
        first, *lines = str(error).splitlines()
        assert first == "config.yaml cannot be used:"
        while lines[-1].startswith("Known keys"):
            lines.pop()
        assert all(line.startswith("  - ") for line in lines)
        return [line.removeprefix("  - ") for line in lines]
    return []


# ---- Conversion


def test_defaults_are_those_of_mistral_finetune_except_for_speed():
    args = load(BASE)
    assert args.data.instruct_data == "train.jsonl"
    assert (args.data.shuffle, args.data.instruct.shuffle, args.data.instruct.dynamic_chunk_fn_call) == (
        False,
        True,
        True,
    )
    assert dataclasses.astuple(args.optim)[:7] == ("adamw", "onecycle", 1e-4, 0.1, 0.05, 25, 1e4)
    assert (args.seed, args.num_microbatches, args.seq_len, args.batch_size) == (0, 1, 2048, 1)
    assert (args.max_norm, args.max_steps, args.log_freq) == (1.0, 100, 1)
    assert (args.ckpt_freq, args.save_adapters, args.no_ckpt, args.num_ckpt_keep) == (0, True, False, 3)
    assert (args.eval_freq, args.no_eval) == (0, True)
    assert (args.lora.enable, args.lora.rank, args.lora.dropout, args.lora.scaling) == (True, 16, 0.0, 2.0)
    assert (args.wandb.project, args.mlflow.tracking_uri, args.lora.from_adapter) == (None, None, None)
    assert (args.param_dtype, args.attention, args.data.packing) == ("auto", "auto", "concat")
    assert (args.checkpoint, args.compile) == ("auto", "auto")
    assert (args.lora.targets, args.loss_normalization) == (["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "microbatch")


def test_numbers_that_yaml_reads_as_strings():
    args = load(
        """
        model_id_or_path: model
        run_dir: 2024          # a number
        data: {instruct_data: train.jsonl}
        optim: {lr: 1e-4, weight_decay: "0.5", pct_start: 0}   # YAML 1.1 reads 1e-4 as a string
        seq_len: "512"
        max_steps: 1e2
        no_eval: "True"
        num_ckpt_keep: null
        """
    )
    assert (args.optim.lr, args.optim.weight_decay, args.optim.pct_start) == (1e-4, 0.5, 0.0)
    assert (args.run_dir, args.seq_len, args.max_steps, args.no_eval, args.num_ckpt_keep) == (
        "2024",
        512,
        100,
        True,
        None,
    )
    assert isinstance(args.seq_len, int) and isinstance(args.optim.pct_start, float)


@pytest.mark.parametrize(
    ("lora", "scaling"),
    [({"rank": 8, "alpha": 12}, 1.5), ({"alpha": 16}, 1.0), ({"scaling": 3}, 3.0), ({"scaling": None}, 2.0)],
)
def test_alpha_is_another_way_to_give_the_scaling(lora: dict[str, Any], scaling: float):
    args = load(BASE | {"lora": lora})
    assert (args.lora.scaling, args.lora.alpha) == (scaling, None)
    assert load(BASE | {"lora": args.to_dict()["lora"]}) == args


def test_block_without_keys_has_its_defaults():
    text = yaml.safe_dump(BASE) + "".join(f"{block}:\n  # key: 1\n" for block in ("optim", "lora", "wandb", "guards"))
    assert load(text) == load(BASE)
    [problem] = problems(data=None)
    assert problem.startswith("`data.instruct_data` and `data.data` are both empty")


def test_empty_string_means_unset_for_trackers():
    keys = {"wandb": {"project": "", "run_name": "", "key": ""}, "mlflow": {"tracking_uri": ""}}
    args = load(BASE | keys)
    assert (args.wandb.project, args.wandb.run_name, args.wandb.key, args.mlflow.tracking_uri) == (None,) * 4


def test_dotted_keys_at_any_depth():
    dotted = load(
        """
        model_id_or_path: model
        run_dir: run
        data.instruct_data: train.jsonl
        data.instruct.shuffle: false
        data.instruct.dynamic_chunk_fn_call: false
        data: {shuffle: true, eval_instruct_data: eval.jsonl}
        optim.lr: 0.5
        wandb.project: ""
        """
    )
    nested = load(
        {
            "model_id_or_path": "model",
            "run_dir": "run",
            "data": {
                "instruct_data": "train.jsonl",
                "eval_instruct_data": "eval.jsonl",
                "shuffle": True,
                "instruct": {"shuffle": False, "dynamic_chunk_fn_call": False},
            },
            "optim": {"lr": 0.5},
        }
    )
    assert dotted == nested
    assert load(BASE | {"data": {"instruct_data": "train.jsonl", "instruct.shuffle": True}}).data.instruct.shuffle


def test_args_yaml_loads_to_the_same_settings_without_the_api_key():
    args = load(
        BASE
        | {
            "data": {
                "data": "texts.jsonl:1.5",
                "instruct_data": "train.jsonl:2",
                "eval_instruct_data": "eval.jsonl",
                "keep_sections": ["Conclusion"],
            },
            "optim": {"lr": 6e-5, "pct_start": 0.1, "div_factor": 5},
            "wandb": {"project": "coding", "offline": True, "key": "0123secret"},
            "lora": {"rank": 64, "dropout": 0.1},
            "num_ckpt_keep": None,
            "no_eval": False,
            "param_dtype": "bf16",
        }
    )
    assert args.wandb.key == "0123secret"
    create_run_dir(Path("run"), dataclasses.replace(args, world_size=2))
    assert "0123secret" not in "".join(file.read_text(encoding="utf-8") for file in Path("run").iterdir())
    assert "key" not in yaml.safe_load(Path("run/args.yaml").read_text(encoding="utf-8"))["wandb"]
    without_key = dataclasses.replace(args, world_size=2, wandb=dataclasses.replace(args.wandb, key=None))
    assert load_train_args(Path("run/args.yaml")) == without_key
    assert "0123secret" not in repr(args)


def test_from_dict_converts_and_checks_like_the_yaml():
    optim = OptimArgs.from_dict({"lr": "1e-4", "schedule": "cosine"})
    assert (optim.lr, optim.schedule) == (1e-4, "cosine")
    for mistake in ({"lr": -1}, {"rate": 1}, {"schedule": "cosin"}):
        with pytest.raises(ValidationError) as error:
            OptimArgs.from_dict(mistake)
    with pytest.raises(ValidationError) as error:
        WandbArgs.from_dict({"key": ["0123secret"]})
    assert "0123secret" not in str(error.value)


def test_settings_without_effect_are_warnings():
    assert load(BASE | {"world_size": 2}).warnings(2) == load(BASE).warnings(2) == []
    [warning] = load(BASE | {"world_size": 8}).warnings(2)
    assert warning.startswith("`world_size: 8` has no effect: this run has 2 processes.")
    [warning] = load(BASE | {"data": {"instruct_data": "train.jsonl", "eval_instruct_data": "eval.jsonl"}}).warnings()
    assert warning.startswith("`data.eval_instruct_data` is not used, because `no_eval` is true")


def test_an_evaluation_computes_whole_training_batches_at_once():
    evaluated = {"no_eval": False, "data": BASE["data"] | {"eval_instruct_data": "eval.jsonl"}, "batch_size": 3}
    assert load(BASE | evaluated | {"eval_batch_size": 6}).eval_batch_size == 6
    [problem] = problems(**evaluated, eval_batch_size=4)
    assert problem.startswith("`eval_batch_size` is 4; expected a multiple of `batch_size`, which is 3")
    [warning] = load(BASE | {"eval_batch_size": 4}).warnings()
    assert warning.startswith("`eval_batch_size` is not used")


def test_tf32_is_for_fp32():
    assert load(BASE | {"tf32": True, "param_dtype": "fp32"}).tf32
    [problem] = problems(tf32=True, param_dtype="bf16")
    assert problem.startswith("`tf32: true` is for fp32, but `param_dtype` is bf16")


def test_reading_settings_imports_neither_torch_nor_a_tokenizer():
    code = "import sys, finetune.args; print([name for name in ('torch', 'mistral_common') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


# ---- Problems


def test_unknown_key_with_suggestion():
    assert problems(seq_length=3) == ["`seq_length` is not a known setting; did you mean `seq_len`?"]
    assert problems(lora={"rnak": 3}) == ["`lora.rnak` is not a known setting; did you mean `lora.rank`?"]
    assert problems(**{"optim.learning": 3}) == ["`optim.learning` is not a known setting."]
    [problem] = problems(**{"data.instruct.shufle": True})
    assert problem == "`data.instruct.shufle` is not a known setting; did you mean `data.instruct.shuffle`?"
    assert problems(**{"wandb.project.name": "x"})[0].startswith(
        "`wandb.project` is dict (not shown); expected a string"
    )


def test_key_of_another_block_is_suggested():
    assert problems(**{"OPTIM.LR": 3}) == ["`OPTIM.LR` is not a known setting; did you mean `optim.lr`?"]
    assert problems(rank=3) == ["`rank` is not a known setting; did you mean `lora.rank`?"]
    assert problems(enable=3) == ["`enable` is not a known setting; did you mean `lora.enable`?"]
    [problem] = problems(key=3)
    assert problem == "`key` is not a known setting; did you mean `wandb.key`?"
    [problem] = problems(**{"optim.shuffle": True})
    assert problem.endswith("did you mean `data.shuffle` or `data.instruct.shuffle`?")


def test_known_keys_are_listed_once_at_the_end_if_a_key_has_no_suggestion():
    with pytest.raises(UserError) as error:
        load(BASE | {f"unknown_{i}_": i for i in range(60)} | {"wandb": {"123": 1, "456": 2, "789": 3}})
    lines = str(error.value).splitlines()
    assert len(lines) == 54 and lines[51] == "  - ... and 13 more"
    assert lines[1] == "  - `unknown_0_` is not a known setting."
    assert lines[-2].startswith("Known keys: attention, base_dtype, batch_size, ") and "world_size" in lines[-2]
    assert lines[-1] == "Known keys of `wandb`: key, offline, project, run_name, timeout."
    assert problems(wandb={"123": 1}) == ["A key of `wandb` is not a known setting."]
    with pytest.raises(UserError) as error:
        load(BASE | {"seq_length": 1, "learning_rate": 1e-4})
    assert "Known keys" not in str(error.value)


def test_keys_that_yaml_does_not_read_as_strings():
    with pytest.raises(UserError, match="`on` is not a known setting"):
        load("on: 1")  # YAML 1.1 reads `on` as true
    with pytest.raises(UserError, match=r"`data\.3` is not a known setting"):
        load("data: {3: x}")


def test_setting_given_both_dotted_and_nested():
    assert problems(**{"data.instruct_data": "texts.jsonl"}) == ["`data.instruct_data` is given twice; give it once."]
    assert "`lora` is 3; expected a block of keys." in problems(**{"lora": 3, "lora.rank": 8})


MISSING = ["`data` is missing; it must be given", "`model_id_or_path` is missing", "`run_dir` is missing"]


def test_missing_keys():
    with pytest.raises(UserError) as error:
        load("{}")
    lines = str(error.value).splitlines()[1:]
    assert [sentence in line for sentence, line in zip(MISSING, lines, strict=True)] == [True] * 3


def test_missing_key_does_not_hide_other_problems():
    with pytest.raises(UserError) as error:
        load({"data": {"instruct_data": "train.jsonl"}, "seq_len": 0, "lora": {"rank": 0}, "optim": {"lr": "fast"}})
    for sentence in ("`seq_len` is 0", "`lora.rank` is 0", "`optim.lr` is 'fast'", *MISSING[1:]):
        assert str(error.value).count(sentence) == 1
    assert len(str(error.value).splitlines()) == 6  # the values that replace missing keys are not reported


WRONG_TYPES = [
    ({"seq_len": "long"}, "`seq_len` is 'long'; expected a whole number of at least 1 (tokens per packed sequence)."),
    ({"seq_len": 0.5}, "`seq_len` is 0.5; expected a whole number"),
    ({"seq_len": None}, "`seq_len` is empty (null); expected a whole number"),
    ({"seq_len": True}, "`seq_len` is True; expected a whole number"),
    ({"seq_len": [1]}, "`seq_len` is [1]; expected a whole number"),
    ({"seed": 10**400}, f"`seed` is {10**400}; expected a whole number"),
    ({"num_ckpt_keep": "all"}, "`num_ckpt_keep` is 'all'; expected a whole number of at least 1 or null"),
    ({"max_norm": "nan"}, "`max_norm` is 'nan'; expected a number greater than 0"),
    ({"max_norm": float("inf")}, "`max_norm` is inf; expected a number greater than 0"),
    ({"optim": {"lr": False}}, "`optim.lr` is False; expected a number of at least 0 (highest learning rate)."),
    ({"optim": {"lr": "1e-4x"}}, "`optim.lr` is '1e-4x'; expected a number"),
    ({"no_eval": 1}, "`no_eval` is 1; expected true or false"),
    ({"no_eval": "maybe"}, "`no_eval` is 'maybe'; expected true or false"),
    ({"run_dir": ["x"]}, "`run_dir` is ['x']; expected a string"),
    ({"run_dir": None}, "`run_dir` is empty (null); expected a string"),
    ({"wandb": {"project": True}}, "`wandb.project` is True; expected a string"),
    ({"data": 3}, "`data` is 3; expected a block of keys."),
    ({"data": "train.csv"}, "`data` is 'train.csv'; expected a block of keys."),
    ({"data": BASE["data"] | {"instruct": [1]}}, "`data.instruct` is [1]; expected a block of keys."),
    ({"data": BASE["data"] | {"keep_sections": "x"}}, "`data.keep_sections` is 'x'; expected a list of strings"),
]


@pytest.mark.parametrize(("keys", "sentence"), WRONG_TYPES)
def test_value_of_the_wrong_type(keys: dict[str, Any], sentence: str):
    [problem] = problems(**keys)
    assert problem.startswith(sentence)


HUGE = {
    "max_steps": 10**23,
    "log_freq": 10**23,
    "ckpt_freq": 2**63,
    "eval_freq": 10**10,
    "seq_len": 10**14,
    "batch_size": 2**63 - 1,
    "eval_batch_size": 2**63 - 1,
    "num_microbatches": 2**62,
    "num_ckpt_keep": 10**30,
    "world_size": 10**12,
    "epochs": 1e300,
    "lora.rank": 2**40,
    "early_stopping.patience": 10**18,
    "optim.patience": 10**18,
    "optim.num_cycles": 2**64,
    "guards.max_skipped_steps": 10**18,
    "guards.spike_window": 10**18,
    "eval_generation.n_samples": 10**18,
    "eval_generation.max_tokens": 10**18,
    "eval_generation.batch_size": 10**18,
    "eval_generation.freq": 10**18,
    "wandb.timeout": 10**18,
    "mlflow.timeout": 10**18,
}


@pytest.mark.parametrize("key", HUGE)
def test_huge_value_is_refused_with_its_limit(key: str):
    [problem] = problems(**{key: HUGE[key]})
    match = re.match(rf"`{re.escape(key)}` is [^;]+; expected at most ([0-9,]+) \(", problem)
    assert match, problem
    limit = match[1].replace(",", "")
    assert not any(
        "expected at most" in problem and key in problem for problem in problems(**{"seq_len": 1, key: limit})
    )


def test_every_count_has_a_limit():
    """So that a new setting gets one, too."""
    numbers = {key for key, setting in known_settings().items() if "a whole number" in setting.expected}
    assert numbers - HUGE.keys() == {"seed"}  # whose range `expected` states


def test_steps_of_too_many_tokens_are_refused():
    [problem] = problems(seq_len=2**20, batch_size=2**8, num_microbatches=2)
    assert problem == (
        "`num_microbatches` * `batch_size` * `seq_len` is 536,870,912 tokens per step and process; expected at most "
        "134,217,728."
    )
    assert problems(seq_len=2**15, batch_size=2**6, num_microbatches=2**6) == []


@pytest.mark.parametrize("text", ["010", "007", "-010", "0b101", "1:30", "1:30:00", "1:30.5", "08", "00"])
@pytest.mark.parametrize("key", ["max_steps", "seed", "optim.lr"])
def test_number_that_yaml_1_1_reads_unlike_its_reader_is_refused(key: str, text: str):
    [problem] = [line.removeprefix("  - ") for line in refused(f"{key}: {text}").splitlines()[1:]]
    assert (
        problem.startswith(f"`{key}` is '{text}'; expected a ") and "plain decimal number, such as 10 or 0.5" in problem
    )


def refused(line: str) -> str:
    with pytest.raises(UserError) as error:
        load(yaml.safe_dump(BASE) + line)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10", 10),
        ("+10", 10),
        ("1_000", 1000),
        ("0x10", 16),
        ("1e3", 1000),
        ("1.0e+3", 1000),
        ("10.0", 10),
        ("1e1", 10),
    ],
)
def test_number_that_has_one_meaning_is_read(text: str, number: int):
    assert load(yaml.safe_dump(BASE) + f"max_steps: {text}").max_steps == number


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), (".5", 0.5), ("0.10", 0.1), ("6.e-5", 6e-5), ("0", 0)])
def test_decimal_number_is_read(text: str, number: float):
    assert load(yaml.safe_dump(BASE) + f"optim: {{lr: {text}}}").optim.lr == number


@pytest.mark.parametrize("text", ["010", "1.10", "0b101", "0x10", "1_000", "1:30", "2024-1-5", "2024_12_19", "12e03"])
def test_name_that_looks_like_a_number_keeps_its_spelling(text: str):
    args = load(yaml.safe_dump({key: value for key, value in BASE.items() if key != "run_dir"}) + f"run_dir: {text}")
    assert args.run_dir == text
    settings = load(yaml.safe_dump(BASE) + f"data.keep_sections: [{text}]")
    assert settings.data.keep_sections == [text]


def of_data(**keys: Any) -> dict[str, Any]:
    return {"data": BASE["data"] | keys}


SHARE = "greater than 0 and less than 1"

INVALID = [
    *[
        ({key: value}, f"`{key}` is {value}; expected a whole number of at least 1 (")
        for key in ("seq_len", "batch_size", "num_microbatches", "max_steps")
        for value in (0, -2)
    ],
    *[
        (
            {key: value},
            f"`{key}` is {value!r}; expected a whole number of at least {least}, a number {SHARE} or epoch (steps",
        )
        for key, least in {"log_freq": 1, "ckpt_freq": 0, "eval_freq": 0}.items()
        for value in (-1, 2.5, "10%", "epochs", True)
    ],
    ({"log_freq": 0}, "`log_freq` is 0; expected a whole number of at least 1, a number"),
    (
        {"num_ckpt_keep": 0},
        "`num_ckpt_keep` is 0; expected a whole number of at least 1 or null (number of latest checkpoints",
    ),
    ({"max_norm": 0}, "`max_norm` is 0; expected a number greater than 0 ("),
    ({"seed": -1}, "`seed` is -1; expected a whole number between 0 and 4294967295 ("),
    ({"seed": 2**32}, "`seed` is 4294967296; expected a whole number between 0 and 4294967295 ("),
    ({"param_dtype": "float8"}, "`param_dtype` is 'float8'; expected auto, bf16, fp16 or fp32 ("),
    ({"attention": "flush"}, "`attention` is 'flush'; expected auto, varlen, xformers, sdpa or cudnn ("),
    ({"model_id_or_path": ""}, "`model_id_or_path` is empty; name the folder of a model."),
    ({"model_id_or_path": "nope"}, "`model_id_or_path`: the folder nope does not exist."),
    ({"model_id_or_path": "train.jsonl"}, "`model_id_or_path`: the folder train.jsonl does not exist."),
    ({"run_dir": ""}, "`run_dir` is empty; name a folder to create."),
    ({"resume": "x" * 300}, "`resume` is 'xxx"),
    ({"resume": "latest"}, "`resume` is 'latest'; expected never, auto, or the folder of a checkpoint."),
    ({"run_dir": " "}, "`run_dir` is empty; name a folder to create."),
    (
        {"no_eval": False},
        "`no_eval` is false but `data.eval_instruct_data` is empty: name data or set `no_eval: true`.",
    ),
    (
        {"lora": {"enable": False}},
        "`save_adapters` is true but `lora.enable` is false: there is no adapter to save. "
        "Set `save_adapters: false` to save the full weights.",
    ),
    ({"lora": {"rank": 0}}, "`lora.rank` is 0; expected a whole number of at least 1 (or set `lora.enable: false`)."),
    ({"lora": {"dropout": 1}}, "`lora.dropout` is 1; expected a number of at least 0 and less than 1 ("),
    ({"lora": {"dropout": -0.1}}, "`lora.dropout` is -0.1; expected a number of at least 0 and less than 1 ("),
    ({"lora": {"scaling": 0}}, "`lora.scaling` is 0; expected a number greater than 0 or null ("),
    ({"lora": {"alpha": -1}}, "`lora.alpha` is -1; expected a number greater than 0 or null ("),
    (
        {"lora": {"rank": 16, "alpha": 32, "scaling": 2}},
        "`lora.alpha` (32.0) and `lora.scaling` (2.0) are both given; scaling is alpha / rank, so give one of them.",
    ),
    (
        {"lora": {"rank": 0, "alpha": 32}},
        "`lora.rank` is 0; expected a whole number of at least 1 (or set `lora.enable: false`).",
    ),
    ({"lora": {"targets": []}}, "`lora.targets` is empty; name a layer (or set `lora.enable: false`)."),
    (
        {"lora": {"targets": ["wq", "q_proj", "p_proj"]}},
        "`lora.targets` contains 'p_proj'; expected a list of wq, wk, wv, wo, w1, w2, w3, gate or output (",
    ),
    (
        {"optim": {"name": "adam"}},
        "`optim.name` is 'adam'; expected adamw, sgd, adagrad, rmsprop, adafactor, lion, lion8bit, adamw8bit, ",
    ),
    ({"checkpoint": "sometimes"}, "`checkpoint` is 'sometimes'; expected true, false, selective or auto ("),
    ({"sharding": 2}, "`sharding` is 2; expected full or hybrid ("),
    ({"base_dtype": "int4"}, "`base_dtype` is 'int4'; expected same, nf4, nf4-dq or fp8 ("),
    (
        {"early_stopping": {"metric": "f1"}},
        "`early_stopping.metric` is 'f1'; expected eval_loss, micro_f1, exact_match, dp_accuracy, ",
    ),
    ({"early_stopping": {"patience": -1}}, "`early_stopping.patience` is -1; expected a whole number of at least 0 ("),
    ({"eval_generation": {"file": "nope"}}, "`eval_generation.file`: nope does not exist (or is not a file)."),
    (
        {"eval_generation": {"n_samples": 0}},
        "`eval_generation.n_samples` is 0; expected a whole number of at least 1 (",
    ),
    ({"guards": {"spike_factor": 1}}, "`guards.spike_factor` is 1.0; expected more than 1, or 0 for no check."),
    ({"guards": {"spike_factor": -1}}, "`guards.spike_factor` is -1; expected a number of at least 0 ("),
    ({"guards": {"spike_window": 9}}, "`guards.spike_window` is 9; expected a whole number of at least 10 ("),
    (
        {"optim": {"schedule": "cosin"}},
        "`optim.schedule` is 'cosin'; expected onecycle, cosine, cosine_with_restarts, linear, ",
    ),
    ({"loss_normalization": "token"}, "`loss_normalization` is 'token'; expected microbatch or tokens ("),
    (
        {"lora": {"enable": False, "from_adapter": "x"}, "save_adapters": False},
        "`lora.from_adapter` is set but `lora.enable` is false: there is no adapter to initialize.",
    ),
    ({"optim": {"pct_start": 2}}, "`optim.pct_start` is 2; expected a number between 0 and 1 (fraction of the steps"),
    (
        {"optim": {"pct_start": -0.1}},
        "`optim.pct_start` is -0.1; expected a number between 0 and 1 (fraction of the steps",
    ),
    ({"optim": {"lr": -1}}, "`optim.lr` is -1; expected a number of at least 0 ("),
    ({"optim": {"weight_decay": -1}}, "`optim.weight_decay` is -1; expected a number of at least 0 ("),
    ({"optim": {"div_factor": 0}}, "`optim.div_factor` is 0; expected a number greater than 0 ("),
    ({"optim": {"final_div_factor": -1}}, "`optim.final_div_factor` is -1; expected a number greater than 0 ("),
    (
        of_data(instruct_data=""),
        "`data.instruct_data` and `data.data` are both empty: name at least one training source.",
    ),
    (
        of_data(instruct_data="nope.jsonl"),
        "`data.instruct_data`: The path nope.jsonl does not exist; expected a jsonl file or a folder of jsonl files.",
    ),
    (
        of_data(eval_instruct_data="model"),
        "`data.eval_instruct_data`: The folder model contains no file whose name ends in 'jsonl'.",
    ),
    (
        of_data(data="texts.jsonl:0"),
        "`data.data`: 'texts.jsonl:0' is not a data source; expected <path> or <path>:<weight>, "
        "but the weight is 0: it must be positive.",
    ),
    (
        of_data(instruct_data="train.jsonl,train.jsonl"),
        "`data.instruct_data`: train.jsonl is listed twice in 'train.jsonl,train.jsonl'; "
        "give it once, with the sum of its weights.",
    ),
    (
        of_data(data="train.jsonl"),
        "train.jsonl is listed under both `data.data` and `data.instruct_data`; its rows are one or the other.",
    ),
    (
        of_data(instruct={"shuffle": False}),
        "`data.instruct.dynamic_chunk_fn_call` needs `data.instruct.shuffle: true`, because the truncated "
        "conversations are appended to the end of each file; set both to true or both to false.",
    ),
    (of_data(packing="first_fit"), "`data.packing` is 'first_fit'; expected concat or best_fit ("),
    (of_data(overlong="cut"), "`data.overlong` is 'cut'; expected shorten, drop or error ("),
]


@pytest.mark.parametrize(("keys", "sentence"), INVALID)
def test_invalid_setting(keys: dict[str, Any], sentence: str):
    [problem] = problems(**keys)
    assert problem.startswith(sentence)


def test_limits_are_accepted():
    assert problems(seed=2**32 - 1, seq_len=1, max_steps=1, optim={"pct_start": 1, "lr": 0}, num_ckpt_keep=1) == []
    assert problems(lora={"enable": False, "rank": 0}, save_adapters=False) == []
    assert problems(lora={"enable": False}, no_ckpt=True) == []
    assert problems(world_size=8) == []


@pytest.mark.parametrize(
    ("package", "keys", "setting"),
    [
        ("wandb", {"wandb": {"project": "x"}}, "wandb.project"),
        ("mlflow", {"mlflow": {"tracking_uri": "x"}}, "mlflow.tracking_uri"),
    ],
)
def test_tracker_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, package: str, keys: dict[str, Any], setting: str
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = problems(**keys)
    assert problem.startswith(f"`{setting}` is set but {package} is not installed: run `pip install -e")


def test_all_problems_are_in_one_message():
    found = problems(
        seq_len=0,
        batch_size="many",
        seeed=3,
        lora={"rank": 0, "scalling": 1},
        optim={"lr": "fast", "pct_start": 3},
        no_eval=False,
        data={"instruct_data": "nope.jsonl:1", "data": "a:b:c"},
        model_id_or_path="nope",
    )
    assert len(found) == 11
    for key in (
        "`seq_len` is 0",
        "`batch_size` is 'many'",
        "`seeed` is not a known setting; did you mean `seed`?",
        "`lora.rank` is 0",
        "`lora.scalling` is not a known setting",
        "`optim.lr` is 'fast'",
        "`optim.pct_start` is 3;",
        "`no_eval` is false",
        "The path nope.jsonl does not exist",
        "'a:b:c' is not a data source",
        "the folder nope does not exist",
    ):
        assert sum(key in problem for problem in found) == 1, key


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must contain `key: value` pairs, found NoneType"),
        (b"- a\n- b", "must contain `key: value` pairs, found list"),
        (b"just a string", "must contain `key: value` pairs, found str"),
        (b"seq_len: [1", "is not valid YAML"),
        (b"\tseq_len: 1", "is not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"run_dir: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        (b"[" * 5000, "is not valid YAML"),
        ("run_dir: é".encode("latin-1"), "is not valid UTF-8 (byte 10)"),
    ],
)
def test_file_that_is_not_yaml(content: bytes, reason: str):
    Path("config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"config.yaml {reason}")):
        load_train_args(Path("config.yaml"))


@pytest.mark.parametrize("name", ["nope.yaml", "model"])
def test_missing_file(name: str):
    with pytest.raises(UserError, match=f"The configuration {name} does not exist"):
        load_train_args(Path(name))


# ---- Sources


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" , ", []),
        ("a.jsonl", [("a.jsonl", 1)]),
        ("a.jsonl:2,b:0.5,", [("a.jsonl", 2), ("b", 0.5)]),
        (" a.jsonl : 2. , my notes/b.jsonl ", [("a.jsonl", 2), ("my notes/b.jsonl", 1)]),
        ("a.jsonl:1e-3", [("a.jsonl", 0.001)]),
        ("E:/notes/a.jsonl", [("E:/notes/a.jsonl", 1)]),
        (r"E:\notes\a.jsonl:3, c:/b", [(r"E:\notes\a.jsonl", 3), ("c:/b", 1)]),
        ("e:2", [("e", 2)]),
    ],
)
def test_sources_are_paths_with_weights(text: str, expected: list[tuple[str, float]]):
    assert parse_sources(text) == [Source(Path(path), weight) for path, weight in expected]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a:b:c", "'a:b:c' is not a data source; expected <path> or <path>:<weight> with at most one colon"),
        ("E:/a:b:c", "'E:/a:b:c' is not a data source"),
        (":2", "':2' is not a data source"),
        ("a:", "'a:' is not a data source"),
        ("a:two", "but 'two' is not a number"),
        ("a:0", "but the weight is 0: it must be positive"),
        ("a:-1.5", "but the weight is -1.5: it must be positive"),
        ("a:nan", "but the weight is nan: it must be positive"),
        ("a:inf", "but the weight is inf: it must be positive"),
        ("a, b, ./a:2", "is listed twice in 'a, b, ./a:2'"),
    ],
)
def test_malformed_source_is_quoted(text: str, reason: str):
    with pytest.raises(UserError, match=re.escape(reason)):
        parse_sources(text)


# ---- Paths, names of layers, frequencies, the name of the run folder


def test_home_and_variables_are_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch):
    home, there = Path("home").resolve(), Path("there").resolve()
    for folder in (home / "model", there):
        folder.mkdir(parents=True)
    for path in (home / "a.jsonl", there / "b.jsonl", there / "eval.jsonl"):
        path.write_text("{}\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("THERE", str(there))
    args = load(
        {
            "model_id_or_path": "~/model",
            "run_dir": "${THERE}/run",
            "resume": "$THERE",
            "data": {
                "data": "$THERE/b.jsonl",
                "instruct_data": "~/a.jsonl:2, ${THERE}/eval.jsonl",
                "eval_instruct_data": "$THERE/eval.jsonl:0.5",
            },
            "lora": {"from_adapter": "$THERE/adapter"},
            "eval_generation": {"file": "~/a.jsonl"},
        }
    )
    assert (args.model_id_or_path, args.run_dir, args.resume) == (f"{home}/model", f"{there}/run", str(there))
    assert args.data.instruct_data == f"{home}/a.jsonl:2, {there}/eval.jsonl"
    assert (args.data.data, args.data.eval_instruct_data) == (f"{there}/b.jsonl", f"{there}/eval.jsonl:0.5")
    assert (args.lora.from_adapter, args.eval_generation.file) == (f"{there}/adapter", f"{home}/a.jsonl")
    assert TrainArgs.from_dict(args.to_dict()) == args


def test_an_undefined_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    found = problems(run_dir="$NO_SUCH/a", data={"instruct_data": "train.jsonl,${NO_SUCH}/b.jsonl"}, resume="$1x")
    found += problems(run_dir="${HOME:-x}/a")
    expected = "the environment variable {} is not defined"
    keys, names = ("data.instruct_data", "run_dir", "resume", "run_dir"), ("NO_SUCH", "NO_SUCH", "1x", "HOME:-x")
    for problem, key, name in zip(found, keys, names, strict=True):
        assert problem.startswith(f"`{key}` is '") and f"; expected a path, but {expected.format(name)} (" in problem


def test_a_path_that_exists_is_taken_as_it_is_written():
    for name in ("$NO_SUCH", "~", "{date}"):
        Path(name).mkdir()
    args = load(BASE | {"model_id_or_path": "$NO_SUCH", "resume": "~", "run_dir": "{date}"})
    assert (args.model_id_or_path, args.resume, args.run_dir) == ("$NO_SUCH", "~", "{date}")


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        (["q_proj", "v_proj", "lm_head"], ["wq", "wv", "output"]),
        (["o_proj", "k_proj", "gate_proj", "up_proj", "down_proj", "gate"], ["wo", "wk", "w1", "w3", "w2", "gate"]),
        ("all-linear", list(BLOCK_LINEARS)),
        (["all-linear"], list(BLOCK_LINEARS)),
        (["w1", "q_proj"], ["w1", "wq"]),
    ],
)
def test_layers_may_have_the_names_of_hugging_face(given: Any, recorded: list[str]):
    args = load(BASE | {"lora": {"targets": given}})
    assert args.lora.targets == recorded == args.to_dict()["lora"]["targets"]


def test_the_names_of_hugging_face_are_those_of_the_conversion():
    inside = {ours.rpartition(".")[2]: theirs.rpartition(".")[2] for ours, theirs in hf_format._IN_LAYER.items()}
    assert {HF_LINEARS[name]: name for name in HF_LINEARS} == {
        **{ours: inside[ours] for ours in BLOCK_LINEARS},
        "output": hf_format._OUTSIDE["output"],
    }


@pytest.mark.parametrize("key", ["log_freq", "ckpt_freq", "eval_freq", "eval_generation.freq"])
@pytest.mark.parametrize(("given", "kept"), [(0.1, 0.1), ("1e-2", 0.01), ("epoch", "epoch"), ("20", 20), (5.0, 5)])
def test_a_frequency_is_a_number_of_steps_a_share_or_epoch(key: str, given: Any, kept: Any):
    load(BASE | {key: given})
    value = load(BASE | {key: given}).to_dict()
    for part in key.split("."):
        value = value[part]
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize("key", ["log_freq", "ckpt_freq", "eval_freq", "eval_generation.freq"])
@pytest.mark.parametrize("given", [1.0, "1.00", "+1.0"])
def test_one_with_a_decimal_point_is_neither_every_step_nor_once(key: str, given: Any):
    [problem] = problems(**{key: given})
    expected = "expected 1 for every step, a share of the run below 1, or epoch: 1.0 is unclear"
    assert problem.startswith(f"`{key}` is {given!r}; {expected}")
    load(BASE | {key: 1})


def test_the_run_folder_can_be_named_by_placeholders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "strftime", lambda pattern: pattern)
    args = load(BASE | {"run_dir": "runs/{date}_{time}_{name}_{seed}", "seed": 7})
    assert args.run_dir == "runs/%Y-%m-%d_%H-%M-%S_config_7"
    named = load(BASE | {"run_dir": "runs/{name}", "resume": "auto", "wandb.run_name": "first"})
    assert named.run_dir == "runs/first"
    [problem] = problems(run_dir="runs/{model}")
    assert problem == "`run_dir` contains {model}; expected one of {date}, {time}, {name}, {seed}."
    [problem] = problems(run_dir="runs/{date}", resume="auto")
    assert problem.startswith("`run_dir` contains {date}, so that `resume: auto` would start another run instead of")


def test_a_missing_demo_names_the_command_that_makes_it():
    advice = "`make demo` creates the folder demo, with its model and data."
    with pytest.raises(UserError) as error:
        load(BASE | {"model_id_or_path": "demo/model"})
    assert str(error.value).splitlines()[-1] == advice
    Path("demo/model").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        load(BASE | {"model_id_or_path": "demo/model", "max_steps": -1})
    assert advice not in str(error.value)


# ---- Settings on the command line


def test_a_setting_on_the_command_line_replaces_that_of_the_file():
    file = BASE | {"optim": {"lr": 1e-3, "name": "sgd"}, "lora": {"rank": 4}}
    args = load(file, "optim.lr=1e-4", "lora={rank: 8}", "lora.targets=[q_proj]", "run_dir=a=b")
    assert (args.optim.lr, args.optim.name, args.run_dir) == (1e-4, "sgd", "a=b")
    assert (args.lora.rank, args.lora.targets) == (8, ["wq"])


def test_a_length_on_the_command_line_replaces_the_other_kind_unless_it_is_null():
    steps, epochs = BASE | {"max_steps": 500}, BASE | {"epochs": 3}
    assert (load(steps, "epochs=2").epochs, load(steps, "epochs=2").max_steps) == (2, 100)
    assert (load(epochs, "max_steps=7").epochs, load(epochs, "max_steps=7").max_steps) == (None, 7)
    assert load(steps, "epochs=null").max_steps == 500


def test_placeholders_may_begin_a_value_on_the_command_line():
    assert load(BASE, "run_dir={name}").run_dir == "config"
    assert load(BASE, "run_dir={name}_{seed}").run_dir == "config_0"


@pytest.mark.parametrize("key", ["run_dir.name", "optim.lr.x"])
def test_a_key_inside_of_a_value_is_not_ignored(key: str):
    outer = key.rpartition(".")[0]
    file = BASE | {"optim": {"lr": 1e-3}}
    for given in (lambda: load(file | {key: 1}), lambda: load(file, f"{key}=1")):
        with pytest.raises(UserError, match=re.escape(f"`{key}` is given, and `{outer}` as a value; give one of them")):
            given()
