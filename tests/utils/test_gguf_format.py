"""GGUF files contain the tensors, shapes, tokenizer and chat template of the model that is exported."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.tokenizer_files import load_instruct_tokenizer
from model.errors import UserError
from model.hf_format import open_model_weights
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.golden import instruct_tokenizer
from tests.support.tiny_tekken import write_tiny_tekken
from tests.utils.test_export import TOKENS, make_run, our_logits
from utils.models.exports import export
from utils.models.hf_tokenizer import chat_template

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `gguf`)")

SMALL = {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "n_layers": 2}
NAMES = {  # llama.cpp's, written down independently of the library
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.experts.w1": "ffn_gate_exps",
    "feed_forward.experts.w2": "ffn_down_exps",
    "feed_forward.experts.w3": "ffn_up_exps",
}


def make_base(folder: Path, *, moe: bool = False, tekken: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    base = make_tiny_checkpoint(folder, moe=moe, dtype=dtype, vocab_size=512 if tekken else 32770, **SMALL)
    if tekken:
        write_tiny_tekken(base / "tekken.json", "v13")
    else:
        shutil.copyfile(instruct_tokenizer("v3").tokenizer.file_path, base / "tokenizer.model.v3")
    return base


def expected_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return a model's weights in fp32 under llama.cpp's names, the experts of a layer stacked."""
    weights, found, experts = open_model_weights(folder), {}, {}
    for name in weights.shapes:
        tensor = weights.read(name).float()
        if not name.startswith("layers."):
            found[NAMES[name]] = tensor
            continue
        _, layer, part = name.removesuffix(".weight").split(".", 2)
        if ".experts." in part:
            stem, number, linear = part.rsplit(".", 2)
            experts.setdefault(f"blk.{layer}.{NAMES[f'{stem}.{linear}']}.weight", {})[int(number)] = tensor
        else:
            found[f"blk.{layer}.{NAMES[part]}.weight"] = tensor
    return found | {name: torch.stack([parts[n] for n in sorted(parts)]) for name, parts in experts.items()}


@pytest.mark.parametrize("dtype", ["fp16", "q8_0", "bf16", "fp32"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_tensors_are_those_of_the_merged_model(tmp_path, moe, dtype, capsys):
    base = make_base(tmp_path / "base", moe=moe, tekken=True)
    run = make_run(tmp_path / "run", base)
    export(run, "mistral", tmp_path / "merged", merged=True, dtype="fp32")
    capsys.readouterr()
    export(run, "gguf", tmp_path / "gguf", merged=True, dtype=dtype)
    name = {"fp16": "F16", "q8_0": "Q8_0", "bf16": "BF16", "fp32": "F32"}[dtype]
    file = tmp_path / "gguf" / f"model-{name}.gguf"
    expected = expected_tensors(tmp_path / "merged")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert found.keys() == expected.keys()
    size = sum(int(tensor.n_bytes) for tensor in found.values())
    assert f"Writing {len(found)} tensors ({name}), {size / 1e6:.1f} MB, to" in capsys.readouterr().out
    for key, tensor in expected.items():
        kind = found[key].tensor_type
        assert kind.name == ("F32" if tensor.dim() == 1 or "gate_inp" in key else name), key
        values = torch.from_numpy(np.array(gguf.quants.dequantize(found[key].data, kind))).float()
        if kind.name == "Q8_0":  # half of 254 steps between the largest of 32 numbers and its opposite, in fp16
            largest = tensor.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(*tensor.shape[:-1], -1, 32)
            assert ((values - tensor).abs() <= largest.flatten(-2) * (1 / 254 + 1 / 2000)).all(), key
        else:
            exact = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind.name]
            assert values.equal(tensor.to(exact).float()), key


def test_transformers_computes_our_logits_from_the_file(tmp_path):
    """An independent reader of names, shapes and of the order of channels within a head; it reads dense models only."""
    import transformers

    base = make_base(tmp_path / "base", tekken=True, dtype=torch.float32)
    export(base, "gguf", tmp_path / "gguf", dtype="fp32")
    options = {"gguf_file": "model-F32.gguf", "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", **options)
    with torch.no_grad():
        logits = theirs(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits, our_logits(base), rtol=0, atol=1e-4)


def fields(folder: Path) -> dict:
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    return {name: field.contents() for name, field in reader.fields.items()}


def test_shapes_and_settings(tmp_path):
    export(make_base(tmp_path / "base", moe=True, tekken=True), "gguf", tmp_path / "gguf")
    found = fields(tmp_path / "gguf")
    assert found["general.architecture"] == "llama" and found["general.file_type"] == 1
    expected = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "context_length": 32768}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16}
    expected |= {"rope.dimension_count": 16, "vocab_size": 512, "expert_count": 4, "expert_used_count": 2}
    assert {name: found[f"llama.{name}"] for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


@pytest.mark.slow
def test_a_sentencepiece_tokenizer(tmp_path):
    base = make_base(tmp_path / "base")
    export(base, "gguf", tmp_path / "gguf", dtype="q8_0")
    found, tokenizer = fields(tmp_path / "gguf"), load_instruct_tokenizer(base, 32770)
    inner = tokenizer.tokenizer
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert tokens == [*(inner.id_to_piece(token) for token in range(inner.n_words)), "[UNUSED_0]", "[UNUSED_1]"]
    scores = [inner._model.get_score(token) for token in range(inner.n_words)]
    assert found["tokenizer.ggml.scores"] == pytest.approx([*scores, 0, 0])
    kinds = {name: gguf.TokenType[name] for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE", "UNUSED")}
    samples = {
        "<unk>": "UNKNOWN",
        "</s>": "CONTROL",
        "[INST]": "CONTROL",
        "<0x0A>": "BYTE",
        "[REFERENCE_DOC_0]": "USER_DEFINED",
        "▁de": "NORMAL",
    }
    assert all(types[tokens.index(token)] == kinds[kind] for token, kind in samples.items())
    assert types[-1] == kinds["UNUSED"]
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == chat_template(tokenizer)


def test_a_tekken_tokenizer(tmp_path):
    base = make_base(tmp_path / "base", tekken=True)
    export(base, "gguf", tmp_path / "gguf")
    found, inner = fields(tmp_path / "gguf"), load_instruct_tokenizer(base, 512).tokenizer
    tokens, specials = found["tokenizer.ggml.tokens"], inner.num_special_tokens
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "tekken")
    assert tokens[:specials] == [inner.id_to_piece(token) for token in range(specials)]
    assert [tokens[specials + byte] for byte in (ord("A"), ord(" "), 0xC3)] == ["A", "Ġ", "Ã"]  # as in GPT-2
    types = found["tokenizer.ggml.token_type"]
    assert types[:specials] == [3] * specials and types[specials] == 1 and len(types) == 512


def test_requests_that_cannot_be_met(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", tekken=True)
    run, out = make_run(tmp_path / "run", base), tmp_path / "out"
    with pytest.raises(UserError, match="add --merged to merge it"):
        export(run, "gguf", out)
    (base / "tekken.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer in Mistral's files, and a GGUF file contains one"):
        export(run, "gguf", out, merged=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'recode-mistral-finetune\[gguf,transformers\]'"):
        export(run, "gguf", out, merged=True)
    assert not out.exists()
