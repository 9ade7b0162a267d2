"""llama.cpp answers as we do from the GGUF files that we write, if llama-cpp-python is installed."""

import shutil

import pytest
import torch

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_trained
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.golden import instruct_tokenizer
from utils.models.exports import export

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")

SMALL = {"dim": 64, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "n_layers": 2}
TURNS = [{"role": "user", "content": "Fièvre à 39 °C,  dyspnée\n🩺"}]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_llama_cpp_computes_our_logits_and_tokens(tmp_path, moe):
    base = make_tiny_checkpoint(tmp_path / "base", moe=moe, dtype=torch.float32, **SMALL)
    shutil.copyfile(instruct_tokenizer("v3").tokenizer.file_path, base / "tokenizer.model.v3")
    model, tokenizer = load_trained(base)
    prompt = SampleEncoder(tokenizer).encode_prompt(parse_conversation({"messages": TURNS}).messages)
    with torch.no_grad():
        expected = model(torch.tensor(prompt), [len(prompt)])[-1]
    export(base, "gguf", tmp_path / "gguf", dtype="fp32")
    file = str(tmp_path / "gguf" / "model-F32.gguf")
    llama = llama_cpp.Llama(file, n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    text = f"[INST]{TURNS[0]['content']}[/INST]"  # what the chat template makes of it, after BOS
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == prompt
    llama.eval(prompt)
    found = torch.tensor(llama.scores[len(prompt) - 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert llama.metadata["tokenizer.chat_template"].endswith("{%- endfor %}\n")
