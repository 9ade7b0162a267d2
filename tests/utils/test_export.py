"""Exports reproduce our logits in the tools they are for; requests that cannot be met are refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.data.tokenizer_files import load_instruct_tokenizer
from model.args import BLOCK_LINEARS, LoraArgs, load_model_args
from model.errors import UserError
from model.hf_format import open_model_weights
from model.lora import add_lora
from model.transformer import Transformer
from model.weights import open_safetensors
from tests.support.checkpoints import make_tiny_adapter, make_tiny_checkpoint
from tests.support.forked import run_forked
from tests.support.golden import instruct_tokenizer
from tests.support.hub_server import FakeHub, only_hub
from tests.support.other_engines import mistral_inference_logits, transformers_logits
from tests.support.tiny_tekken import write_tiny_tekken
from utils import export as export_command
from utils.models.exports import export

ROOT = Path(__file__).parents[2]
SMALL = {"dim": 32, "hidden_dim": 48, "vocab_size": 96, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8}
RANK, SCALING = 4, 3.0
TOKENS = torch.randint(SMALL["vocab_size"], (13,), generator=torch.Generator().manual_seed(0)).tolist()
moe_or_dense = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


def make_base(folder: Path, moe: bool = False) -> Path:
    return make_tiny_checkpoint(folder, moe=moe, dtype=torch.float32, **SMALL)


def make_run(folder: Path, base: Path, steps: tuple[int, ...] = (1,), targets: Sequence[str] = BLOCK_LINEARS) -> Path:
    """Make a run folder with an adapter in each checkpoint."""
    params = json.loads((base / "params.json").read_text(encoding="utf-8"))
    params["lora"] = {"rank": RANK, "scaling": SCALING, "base_model": str(base)}
    for step in steps:
        checkpoint = folder / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"
        file = checkpoint / "lora.safetensors"
        adapter = make_tiny_adapter(base, file, rank=RANK, dtype=torch.float32, targets=targets)
        scaled = {name: tensor * step for name, tensor in load_file(adapter).items()}
        save_file(scaled, adapter)
        (checkpoint / "params.json").write_text(json.dumps(params), encoding="utf-8")
    (folder / "args.yaml").touch()
    return folder


def checkpoint_of(run: Path, step: int = 1) -> Path:
    return run / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"


def our_logits(folder: Path, adapter: Path | None = None, targets: Sequence[str] = BLOCK_LINEARS) -> torch.Tensor:
    weights = open_model_weights(folder)
    with torch.device("meta"):
        model = Transformer(load_model_args(folder))
        if adapter:
            add_lora(model, LoraArgs(rank=RANK, scaling=SCALING, targets=list(targets)))
    tensors = {name: weights.read(name) for name in weights.shapes}
    if adapter:
        lora = open_safetensors(adapter)
        tensors |= {name: lora.read(name) for name in lora.shapes}
    model.load_state_dict(tensors, assign=True)
    with torch.no_grad():
        return model(torch.tensor(TOKENS), [len(TOKENS)])


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def trained(request, tmp_path_factory) -> tuple[Path, Path, torch.Tensor]:
    """Base, run and their logits together."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_base(folder / "base", request.param)
    run = make_run(folder / "run", base)
    logits = our_logits(base, checkpoint_of(run) / "lora.safetensors")
    assert (logits - our_logits(base)).abs().max() > 0.1
    return base, run, logits


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


# Results


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # PEFT, about fused experts
def test_peft_computes_our_logits(trained, tmp_path):
    base, run, logits = trained
    export(run, "peft", tmp_path / "adapter")
    export(base, "hf", tmp_path / "base")
    assert_same(transformers_logits(tmp_path / "base", TOKENS, tmp_path / "adapter"), logits)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (RANK, RANK * SCALING)


def test_transformers_computes_our_logits(trained, tmp_path):
    _, run, logits = trained
    export(run, "hf", tmp_path / "hf", merged=True)
    assert_same(transformers_logits(tmp_path / "hf", TOKENS), logits)
    assert_same(our_logits(tmp_path / "hf"), logits)


def test_mistral_inference_computes_our_logits(trained, tmp_path):
    _, run, logits = trained
    export(run, "mistral", tmp_path / "merged", merged=True)
    assert_same(mistral_inference_logits(tmp_path / "merged", TOKENS), logits)
    assert "lora" not in json.loads((tmp_path / "merged" / "params.json").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")
@pytest.mark.parametrize(
    "moe, targets, theirs",
    [
        (False, ["wq", "wv"], ["q_proj", "v_proj"]),
        (False, ["wk", "w2", "output"], ["down_proj", "k_proj", "lm_head"]),
        (True, ["wo", "gate", "output"], ["gate", "lm_head", "o_proj"]),
        (True, ["w2"], ["w2"]),
    ],
)
def test_adapters_of_some_layers(moe, targets, theirs, tmp_path):
    base = make_base(tmp_path / "base", moe)
    run = make_run(tmp_path / "run", base, targets=targets)
    logits = our_logits(base, checkpoint_of(run) / "lora.safetensors", targets)
    assert (logits - our_logits(base)).abs().max() > 0.01
    export(base, "hf", tmp_path / "base_hf")
    export(run, "peft", tmp_path / "peft")
    assert_same(transformers_logits(tmp_path / "base_hf", TOKENS, tmp_path / "peft"), logits)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == theirs
    for to, their_logits in (("hf", transformers_logits), ("mistral", mistral_inference_logits)):
        export(run, to, tmp_path / to, merged=True)
        assert_same(their_logits(tmp_path / to, TOKENS), logits)


@pytest.mark.parametrize("targets", [["w1"], ["w1", "w3"], ["w2", "w3"]])
def test_adapters_of_experts_that_peft_would_misread_are_refused(targets, tmp_path):
    base = make_base(tmp_path / "base", moe=True)
    run = make_run(tmp_path / "run", base, targets=["wq", *targets])
    with pytest.raises(UserError, match="if w1, w2 and w3 all have one: export it with --to hf --merged"):
        export(run, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_tokenizer_in_hugging_faces_files_only_is_not_replaced(trained, tmp_path):
    """Without them, training from the new folder would use mistral-common's tokenizer."""
    _, run, _ = trained
    base = Path(shutil.copytree(trained[0], tmp_path / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_text("{}", encoding="utf-8")
    for to in ("hf", "mistral"):
        export(run, to, tmp_path / to, merged=True, base=base)
        with pytest.raises(UserError, match=r"is not read: tokenizer.json, tokenizer_config.json, chat_template.jinja"):
            load_instruct_tokenizer(tmp_path / to, 32768)


def test_a_checkpoint_of_all_weights_needs_no_merging(trained, tmp_path):
    _, run, logits = trained
    export(run, "mistral", tmp_path / "whole", merged=True)
    for to, theirs in (("hf", transformers_logits), ("mistral", mistral_inference_logits)):
        export(tmp_path / "whole", to, tmp_path / to)
        assert_same(theirs(tmp_path / to, TOKENS), logits)


def test_base_in_hugging_faces_layout(trained, tmp_path):
    base, run, logits = trained
    export(base, "hf", tmp_path / "base")
    export(run, "mistral", tmp_path / "mistral", merged=True, base=tmp_path / "base")
    assert_same(mistral_inference_logits(tmp_path / "mistral", TOKENS), logits)
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    export(run, "hf", tmp_path / "hf", merged=True, base=tmp_path / "base")
    assert_same(transformers_logits(tmp_path / "hf", TOKENS), logits)
    assert json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"] == 77


def test_step_selects_the_checkpoint_of_a_run(tmp_path):
    base = make_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base, steps=(1, 2))
    (run / "checkpoints" / "best").symlink_to("checkpoint_000001")
    first = checkpoint_of(run, 1)
    for source, step, expected in (
        (run, None, 2),
        (run, 1, 1),
        (run, "best", 1),
        (first.parent, None, 1),
        (first, None, 1),
    ):
        out = tmp_path / f"{source.name}_{step}"
        export(source, "peft", out, step=step)
        written = load_file(out / "adapter_model.safetensors")
        name = "layers.0.feed_forward.w2.lora_B.weight"
        theirs = written["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
        assert theirs.equal(load_file(checkpoint_of(run, expected) / "lora.safetensors")[name])


def test_an_adapter_of_few_layers(tmp_path):
    base = make_base(tmp_path / "base")
    checkpoint = checkpoint_of(make_run(tmp_path / "run", base))
    tensors = load_file(checkpoint / "lora.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".wq." in name or ".w2." in name}
    save_file(kept, checkpoint / "lora.safetensors")
    export(checkpoint, "peft", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "q_proj"]
    export(checkpoint, "hf", tmp_path / "merged", merged=True)
    export(base, "hf", tmp_path / "base_hf")
    adapted = transformers_logits(tmp_path / "base_hf", TOKENS, tmp_path / "adapter")
    assert_same(adapted, transformers_logits(tmp_path / "merged", TOKENS))


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tekken.json"])
def test_transformers_reads_prompts_as_training_did(tmp_path, name):
    import transformers

    vocabulary = 400 if name == "tekken.json" else 32768
    base = make_tiny_checkpoint(tmp_path / "base", dtype=torch.float32, **SMALL | {"vocab_size": vocabulary})
    if name == "tekken.json":
        write_tiny_tekken(base / name, "v7")
    else:
        shutil.copyfile(instruct_tokenizer("v3").tokenizer.file_path, base / name)
    export(base, "hf", tmp_path / "hf")
    ours = SampleEncoder(load_instruct_tokenizer(tmp_path / "hf", vocabulary))
    turns = [{"role": "system", "content": "Tu codes."}, {"role": "user", "content": "Fièvre à 39 °C,  dyspnée"}]
    prompt = ours.encode_prompt(parse_conversation({"messages": turns}).messages)
    for reader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = reader.from_pretrained(tmp_path / "hf")
        assert theirs.apply_chat_template(turns)["input_ids"] == prompt
        assert theirs.eos_token_id == 2
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.do_sample) == (1, 2, False)
    assert (tmp_path / "hf" / "tokenizer.model").exists() == (name != "tekken.json")


def test_merged_models_keep_the_dtype_of_their_base(tmp_path, capsys):
    base = make_tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16, **SMALL)
    run = make_run(tmp_path / "run", base)  # an adapter in fp32
    export(run, "mistral", tmp_path / "exact", merged=True, dtype="fp32")
    exact = load_file(tmp_path / "exact" / "consolidated.safetensors")
    export(run, "hf", tmp_path / "hf", merged=True)
    assert "Writing 21 tensors (bfloat16)" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
    merged = open_model_weights(tmp_path / "hf")
    assert {exact[name].dtype for name in exact} == {torch.float32}
    assert all(merged.read(name).equal(exact[name].bfloat16()) for name in exact)


def test_a_checkpoint_of_all_weights_in_another_dtype(trained, tmp_path):
    base, _, _ = trained
    export(base, "hf", tmp_path / "half", dtype="fp16")
    weights, expected = open_model_weights(tmp_path / "half"), open_model_weights(base)
    assert json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "float16"
    assert all(weights.read(name).equal(expected.read(name).half()) for name in expected.shapes)


def test_peft_adapters_name_a_base_that_peft_can_load(trained, tmp_path, capsys):
    base, run, _ = trained
    export(base, "hf", tmp_path / "base")

    def named(number: int, given: Path | None) -> str | None:
        export(run, "peft", tmp_path / f"adapter_{number}", base=given)
        config = json.loads((tmp_path / f"adapter_{number}" / "adapter_config.json").read_text(encoding="utf-8"))
        return config["base_model_name_or_path"]

    assert named(1, tmp_path / "base") == str(tmp_path / "base")
    assert named(2, Path("mistralai/Mistral-7B-v0.3")) == "mistralai/Mistral-7B-v0.3"
    assert "names no base model" not in capsys.readouterr().out
    assert named(3, None) is None  # the run's own base is in Mistral's layout
    assert f"names no base model: PEFT cannot load {base}. Convert it with" in capsys.readouterr().out
    for given in (base, tmp_path / "none", Path("a/b/c")):
        refused("is not a model in Hugging Face's layout, which PEFT needs", run, "peft", tmp_path / "out", base=given)


# Refusals


def refused(message: str, *args, **kwargs) -> None:
    out = args[2]
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        export(*args, **kwargs)
    assert sorted(out.parent.rglob("*")) == before


def test_sources_without_weights_are_refused(tmp_path):
    out = tmp_path / "out"
    refused("does not exist", tmp_path / "none", "peft", out)
    (tmp_path / "empty").mkdir()
    refused("is not a run folder .*, a checkpoint or a model folder", tmp_path / "empty", "peft", out)
    (tmp_path / "empty" / "args.yaml").touch()
    refused("has no checkpoint; train it first", tmp_path / "empty", "peft", out)
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"))
    refused("has no checkpoint of step 7", run, "peft", out, step=7)
    refused("--step selects a checkpoint of a run", checkpoint_of(run), "peft", out, step=1)


def test_requests_that_do_not_fit_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    run, out = make_run(tmp_path / "run", base), tmp_path / "out"
    refused("is a whole model, not an adapter .* --to hf", base, "peft", out)
    refused("--to peft writes only the adapter", run, "peft", out, merged=True)
    refused("--to peft writes the adapter as it was trained: omit --dtype", run, "peft", out, dtype="fp16")
    refused("q8_0 is a format of GGUF files", run, "hf", out, merged=True, dtype="q8_0")
    refused("add --merged .* or use the adapter alone with --to peft", run, "hf", out)
    refused("add --merged .*lora.safetensors is in Mistral's layout", run, "mistral", out)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").touch()
    for to, merged in (("peft", False), ("hf", True), ("mistral", True)):
        refused("already exists and is not an empty folder", run, to, tmp_path / "there", merged=merged)


def test_bases_that_do_not_fit_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    run, out = make_run(tmp_path / "run", base), tmp_path / "out"
    other = make_tiny_checkpoint(tmp_path / "other", dtype=torch.float32, **SMALL | {"dim": 64})
    refused("does not fit the model", run, "hf", out, merged=True, base=other)
    base.rename(tmp_path / "moved")
    refused(
        r"base model .*base, which .* was trained on, does not exist: give its folder with --base",
        run,
        "hf",
        out,
        merged=True,
    )
    export(run, "hf", out, merged=True, base=tmp_path / "moved")
    params = checkpoint_of(run) / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text(encoding="utf-8")) | {"lora": None}), encoding="utf-8")
    refused(
        r"params.json does not record the adapter's base model: give it with --base",
        run,
        "hf",
        tmp_path / "again",
        merged=True,
    )


def test_adapters_of_several_ranks_cannot_be_exported_to_peft(tmp_path):
    checkpoint = checkpoint_of(make_run(tmp_path / "run", make_base(tmp_path / "base")))
    tensors = load_file(checkpoint / "lora.safetensors")
    tensors["layers.0.attention.wq.lora_A.weight"] = tensors["layers.0.attention.wq.lora_A.weight"][:2].contiguous()
    save_file(tensors, checkpoint / "lora.safetensors")
    refused(r"adapters of ranks \[2, 4\]; PEFT expects a single rank", checkpoint, "peft", tmp_path / "out")


def test_a_failed_export_writes_nothing(trained, tmp_path, monkeypatch):
    _, run, _ = trained
    monkeypatch.setattr("utils.models.merging.merged_weight", lambda *_: 1 / 0)
    for to in ("hf", "mistral"):
        with pytest.raises(ZeroDivisionError):
            export(run, to, tmp_path / "out", merged=True)
        assert not list(tmp_path.iterdir())


def test_content_and_size_are_announced_before_writing(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"))
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "base" / "consolidated.safetensors").values())
    export(run, "mistral", tmp_path / "out", merged=True)
    lines = capsys.readouterr().out.splitlines()
    announced = f"Writing 21 tensors (float32), {size / 1e6:.1f} MB, to {tmp_path / 'out'}."
    assert lines.index(announced) < lines.index(f"Exported {checkpoint_of(run)} to {tmp_path / 'out'}.")


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_too_little_memory_or_disk_is_reported_before_a_tensor_is_read(to, tmp_path, monkeypatch):
    base = make_tiny_checkpoint(tmp_path / "base", **SMALL | {"vocab_size": 32768})
    shutil.copyfile(instruct_tokenizer("v3").tokenizer.file_path, base / "tokenizer.model.v3")
    run = make_run(tmp_path / "run", base)
    monkeypatch.setattr("utils.models.merging.MergedWeights.read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr("finetune.preflight.free_bytes", lambda *_, **__: 32768 * 32 * 24 - 1)
    refused(r"`output.weight` alone needs 0\.0 GiB, but each process", run, to, tmp_path / "out", merged=True)
    monkeypatch.setattr("finetune.preflight.free_bytes", lambda *_, **__: 32768 * 32 * 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    refused(r"out needs 0\.0 GB, but its disk has 0\.0 GB free", run, to, tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_line(tmp_path):
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"))
    failed = run_forked(export_command, run, "--to", "hf", "--out", tmp_path / "x")
    assert failed.returncode == 1
    assert (
        failed.stderr.startswith(f"error: {checkpoint_of(run)} is an adapter, and") and "Traceback" not in failed.stderr
    )
    options = ("--to", "hf", "--merged", "--step", "1", "--base", tmp_path / "base", "--out", tmp_path / "y")
    run_forked(export_command, run, *options, "--dtype", "fp16").check_returncode()
    assert set(open_model_weights(tmp_path / "y").dtypes.values()) == {torch.float16}
    assert {path.name for path in (tmp_path / "y").iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "merge_lora"])
def test_help_does_not_load_torch(command):
    program = f"import sys, utils.{command}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# --- Uploads


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with only_hub({}, monkeypatch, tmp_path / "no_token") as server:
        server.repositories = {}
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


@pytest.fixture
def pushed(tmp_path, run_command):
    """A function that exports an adapter with these options; it returns the exit code, the output and the folder."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base"))

    def push(*options):
        code, said = run_command(export_command, run, "--to", "peft", "--out", tmp_path / "peft", *options)
        return code, said, tmp_path / "peft"

    return push


def test_an_export_is_uploaded_only_when_asked(hub: FakeHub, pushed):
    code, _, folder = pushed()
    assert code == 0 and hub.requests == []
    shutil.rmtree(folder)
    code, said, folder = pushed("--push", "chu/icd10")
    assert code == 0, said
    assert hub.repositories == {"chu/icd10": "private"}
    assert hub.uploaded == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert (
        f"Uploading to {hub.url}/chu/icd10 (private): README.md, adapter_config.json, adapter_model.safetensors, "
        in said
    )
    assert "These files leave this machine, nothing else does." in said and "hf_secret" not in said


def test_a_public_repository_must_be_asked_for(hub: FakeHub, pushed):
    hub.repositories = {"chu/icd10": "public"}
    code, said, folder = pushed("--push", "chu/icd10")
    assert code == 1 and "chu/icd10 exists and is public" in said
    assert not folder.exists() and hub.uploaded == {}
    assert pushed("--push", "chu/icd10", "--public")[0] == 0
    assert set(hub.uploaded) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    shutil.rmtree(folder)
    assert pushed("--push", "chu/other", "--public")[0] == 0
    assert hub.repositories["chu/other"] == "public"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--push", "icd10"], "'icd10' is not the name of a repository; expected owner/name"),
        (["--public"], "--public is for --push"),
    ],
)
def test_uploads_that_cannot_work_are_refused_first(options, sentence, hub: FakeHub, pushed):
    code, said, folder = pushed(*options)
    assert code != 0 and sentence in said
    assert not folder.exists() and hub.requests == []


def test_without_a_token_nothing_is_exported(hub: FakeHub, pushed, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, said, folder = pushed("--push", "chu/icd10")
    assert code == 1 and "--push needs a token with write access: run `hf auth login`" in said
    assert not folder.exists() and hub.requests == []


def test_an_upload_that_fails_keeps_the_export(hub: FakeHub, pushed):
    hub.errors["/api/repos/create"] = (403, "")
    code, said, folder = pushed("--push", "chu/icd10")
    assert code == 1 and "create one with more permissions" in said
    assert f"The export in {folder} is complete. To upload it: hf upload chu/icd10 {folder} . --private" in said
    assert (folder / "adapter_config.json").is_file()
