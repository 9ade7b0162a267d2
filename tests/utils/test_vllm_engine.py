"""The engine vllm, with a stand-in for vLLM, which our tests do not install."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from model.hf_config import config_from_params
from tests.support.checkpoints import make_tiny_checkpoint
from utils import predict_icd10
from utils.icd10.answers import Diagnosis, build_answer

ANSWER = build_answer([Diagnosis("DP", "J459", "Asthme")])
CONTEXT = 400


@dataclasses.dataclass
class Vllm:
    """Records what vLLM is asked for, and answers each prompt with ANSWER.

    Attributes:
        settings: of the last model.
        asked: number of tokens of each prompt, and its sampling.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    asked: list[tuple[int, dict[str, Any]]] = dataclasses.field(default_factory=list)

    def load(self, **settings: Any) -> "Vllm":
        self.settings = settings
        return self

    def generate(self, inputs: list[dict[str, list[int]]], params: list[dict[str, Any]], use_tqdm: bool) -> list:
        assert not use_tqdm
        lengths = [len(each["prompt_token_ids"]) for each in inputs]
        assert all(length < self.settings["max_model_len"] for length in lengths)
        self.asked += zip(lengths, params, strict=True)
        tokens = MistralTokenizer.v3().instruct_tokenizer.tokenizer.encode(ANSWER, bos=False, eos=True)
        logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in tokens]
        output = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
        return [SimpleNamespace(outputs=[output]) for _ in inputs]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """The stand-in, in place of the module."""
    recorded = Vllm()
    module, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(module).update(LLM=recorded.load, SamplingParams=dict)
    vars(params).update(StructuredOutputsParams=lambda grammar: grammar)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return recorded


@pytest.fixture
def predict(tmp_path: Path, run_command: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str, list[dict]]]:
    """Return a function that answers notes with so many words each."""
    export = make_tiny_checkpoint(tmp_path / "export")
    params = json.loads((export / "params.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (export / "config.json").write_text(json.dumps(config_from_params(params, "bfloat16")))
    (export / "params.json").unlink()

    def run(words: Sequence[int], *options: object) -> tuple[int, str, list[dict]]:
        notes = [{"id": f"s{number}", "text": "Asthme. " * count} for number, count in enumerate(words)]
        (tmp_path / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
        arguments = ["--engine", "vllm", "--run", export, "--notes", tmp_path / "notes.jsonl", *options]
        code, output = run_command(predict_icd10, *arguments, "--out", tmp_path / "p.jsonl")
        return code, output, [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]

    return run


def test_vllm_is_given_room_for_the_longest_prompt_and_its_answer(vllm: Vllm, predict) -> None:
    code, _, rows = predict((1, 20), "--max_tokens", 30)
    assert code == 0
    assert [row["answer"] for row in rows] == [ANSWER] * 2
    assert all(row["log_probability"] < -5 for row in rows)
    assert all(params["max_tokens"] == 30 and params["temperature"] == 0 for _, params in vllm.asked)
    assert vllm.settings["max_model_len"] == max(length for length, _ in vllm.asked) + 30


def test_a_prompt_longer_than_the_context_is_not_sent(vllm: Vllm, predict) -> None:
    code, output, rows = predict((1000, 1))
    assert code == 1 and "1 row was not used (s0): longer than the model's context: 1." in output
    assert [row["id"] for row in rows] == ["s1"]
    assert vllm.settings["max_model_len"] == CONTEXT and len(vllm.asked) == 1


def test_a_grammar_goes_to_llguidance_and_answers_are_checked(vllm: Vllm, predict, tmp_path: Path) -> None:
    (tmp_path / "cim10.tsv").write_text("code\ttype_mco\tlabel\nI10\t0\tHypertension\n")
    code, output, rows = predict((1, 2), "--cim10", tmp_path / "cim10.tsv")
    assert vllm.settings["structured_outputs_config"] == {"backend": "guidance"}
    assert all("Hypertension (I10)" in params["structured_outputs"] for _, params in vllm.asked)
    assert code == 1 and not rows and "the engine did not follow the grammar: 2" in output
