"""Extending a model of 32,000 tokens: positions of the rows, values of the new ones, unchanged logits of old tokens."""

import json
from pathlib import Path

import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import load_file, save_file

from model.args import load_model_args
from model.errors import UserError
from model.transformer import Transformer
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.forked import run_forked
from utils import extend_model_vocab as command
from utils.models.exports import export
from utils.models.vocabulary import extend_model_vocab

SMALL = {"dim": 16, "n_layers": 1, "head_dim": 8, "hidden_dim": 24, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 32000}
TABLES = ["tok_embeddings.weight", "output.weight"]


@pytest.fixture
def original(tmp_path) -> Path:
    return make_tiny_checkpoint(tmp_path / "original", **SMALL)


def to_pth(folder: Path) -> None:
    torch.save(load_file(folder / "consolidated.safetensors"), folder / "consolidated.00.pth")
    (folder / "consolidated.safetensors").unlink()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("moe", [False, True])
def test_rows_move_and_everything_else_is_unchanged(tmp_path, kind, moe):
    original = make_tiny_checkpoint(tmp_path / "original", moe=moe, **SMALL)
    old = load_file(original / "consolidated.safetensors")
    if kind == "pth":
        to_pth(original)
    extend_model_vocab(original, tmp_path / "new")
    new = load_file(tmp_path / "new" / "consolidated.safetensors")
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        if name in TABLES:
            assert new[name].shape == (32768, 16)
            assert new[name][:3].equal(tensor[:3]) and new[name][771:].equal(tensor[3:])
        else:
            assert new[name].equal(tensor)


def test_new_folder_is_a_complete_model(tmp_path, original):
    extend_model_vocab(original, tmp_path / "new")
    names = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert names == ["consolidated.safetensors", "params.json", "tokenizer.model.v3"]
    old = json.loads((original / "params.json").read_text(encoding="utf-8"))
    new = json.loads((tmp_path / "new" / "params.json").read_text(encoding="utf-8"))
    assert new == old | {"vocab_size": 32768}
    tokenizer = MistralTokenizer.from_file(str(tmp_path / "new" / "tokenizer.model.v3")).instruct_tokenizer.tokenizer
    assert tokenizer.n_words == 32768
    assert tokenizer.version.value == "v3"


def test_rope_theta_is_written(tmp_path, original):
    params = json.loads((original / "params.json").read_text(encoding="utf-8"))
    del params["rope_theta"]
    (original / "params.json").write_text(json.dumps(params), encoding="utf-8")
    extend_model_vocab(original, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "params.json").read_text(encoding="utf-8"))["rope_theta"] == 10000.0


def test_old_tokens_keep_their_logits(tmp_path):
    original = make_tiny_checkpoint(tmp_path / "original", dtype=torch.float32, **SMALL)
    extend_model_vocab(original, tmp_path / "new")

    def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
        model = Transformer(load_model_args(folder))
        model.load_state_dict(load_file(folder / "consolidated.safetensors"))
        with torch.no_grad():
            return model(tokens, [len(tokens)])

    old_ids = torch.tensor([1, 3, 31999, 2, 500])
    new_ids = torch.where(old_ids < 3, old_ids, old_ids + 768)
    old, new = logits(original, old_ids), logits(tmp_path / "new", new_ids)
    torch.testing.assert_close(torch.cat([new[:, :3], new[:, 771:]], dim=1), old)


def test_pieces_of_the_v3_tokenizer_move_in_the_same_way():
    pieces = {
        version: tokenizer.instruct_tokenizer.tokenizer
        for version, tokenizer in [("v1", MistralTokenizer.v1()), ("v3", MistralTokenizer.v3())]
    }
    assert pieces["v1"].n_words == 32000
    for token in [*range(3), 3, 258, 259, 1000, 31999]:
        moved = token if token < 3 else token + 768
        assert pieces["v3"].id_to_piece(moved) == pieces["v1"].id_to_piece(token)


def test_new_rows_equal_those_of_mistral_finetune(tmp_path):
    original = make_tiny_checkpoint(tmp_path / "original", dtype=torch.float32, **SMALL | {"dim": 64})
    extend_model_vocab(original, tmp_path / "new", seed=0)
    new = load_file(tmp_path / "new" / "consolidated.safetensors")
    # Row 3 of either table as mistral-finetune draws it after torch.manual_seed(0).
    expected = {
        "tok_embeddings.weight": [-0.14072997868061066, -0.14404502511024475, -0.03132232278585434],
        "output.weight": [0.10939618200063705, -0.18980881571769714, -0.04134796932339668],
    }
    for name, values in expected.items():
        torch.testing.assert_close(new[name][3, :3], torch.tensor(values), rtol=1e-6, atol=0)
        rows = new[name][3:771]
        assert rows.std().item() == pytest.approx(64**-0.5, rel=0.02)
        assert abs(rows.mean().item()) < 0.002


def test_seed_determines_only_the_new_rows(tmp_path, original):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        torch.manual_seed(len(name) + seed)  # the global generator must have no effect
        extend_model_vocab(original, tmp_path / name, seed=seed)
    files = [(tmp_path / name / "consolidated.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


# Errors


def test_other_vocabularies_are_rejected(tmp_path):
    for size, sentence in [(32768, "already has been"), (131072, "only models of 32000 tokens can be extended")]:
        model = make_tiny_checkpoint(tmp_path / str(size), **SMALL | {"vocab_size": 64})
        params = json.loads((model / "params.json").read_text(encoding="utf-8")) | {"vocab_size": size}
        (model / "params.json").write_text(json.dumps(params), encoding="utf-8")
        with pytest.raises(UserError, match=rf"`vocab_size` is {size}.*{sentence}"):
            extend_model_vocab(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_file_that_exists_is_named(tmp_path, original):
    export(original, "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"vocab_size": 32002}), encoding="utf-8")
    with pytest.raises(UserError, match=r"hf/config.json: `vocab_size` is 32002"):
        extend_model_vocab(tmp_path / "hf", tmp_path / "new")
    file.write_text(json.dumps(config | {"hidden_size": 17, "head_dim": 8}), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not match .*hf/config.json, which requires \[32000, 17\]"):
        extend_model_vocab(tmp_path / "hf", tmp_path / "new")


def test_weights_that_do_not_match_params_are_rejected(tmp_path, original):
    file = original / "consolidated.safetensors"
    tensors = load_file(file)
    del tensors["output.weight"]
    save_file(tensors | {"tok_embeddings.weight": torch.zeros(32768, 16)}, file)
    with pytest.raises(UserError) as caught:
        extend_model_vocab(original, tmp_path / "new")
    assert "tok_embeddings.weight: [32768, 16]" in str(caught.value)
    assert "output.weight: is missing" in str(caught.value)


def test_non_empty_target_is_rejected(tmp_path, original):
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        extend_model_vocab(original, original)
    assert len(list(original.iterdir())) == 2


def test_a_failed_extension_writes_nothing(tmp_path, original, monkeypatch):
    monkeypatch.setattr("utils.models.vocabulary._with_new_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend_model_vocab(original, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [original]


@pytest.mark.slow
def test_command_line(tmp_path, original):
    target = ("--extended_model_ckpt", tmp_path / "new")
    failed = run_forked(command, "--original_model_ckpt", tmp_path, *target)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {tmp_path / 'params.json'} does not exist")
    assert failed.stderr.count("\n") == 1
    to_pth(original)
    done = run_forked(command, "--original_model_ckpt", original, *target, "--seed", "7")
    done.check_returncode()
    assert load_model_args(tmp_path / "new").vocab_size == 32768
