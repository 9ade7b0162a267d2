"""The demo's base model: pretraining examples, training, written files."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder, TokenSample
from finetune.inference import load_trained
from model.errors import UserError
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, open_safetensors
from utils.fictional_notes.catalogue import Catalogue, load_catalogue
from utils.fictional_notes.pretraining_examples import PretrainingExamples
from utils.icd10.answers import parse_answer
from utils.icd10.prompts import SYSTEM_PROMPT, USER_PROMPT
from utils.models.demo_model import EXAMPLES_PER_STEP, demo_model_args, make_demo_model, train_demo_model

CATALOGUE = load_catalogue()
ARGS = dataclasses.replace(demo_model_args(dim=64, n_layers=1), vocab_size=200)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are slower with several threads, 100 times slower if other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(PretrainingExamples(CATALOGUE, seed=0).rows(400))


def samples(steps: int, length: int = 12) -> list[TokenSample]:
    """Samples with few of the 200 tokens that are easy to learn: each token is the previous one plus one."""
    starts = np.arange(steps * EXAMPLES_PER_STEP) % 5 + 20
    return [
        TokenSample(list(range(start, start + length)), [False] * 4 + [True] * (length - 4))
        for start in starts.tolist()
    ]


def logits(weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    model = Transformer(ARGS)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.tensor(tokens), [len(tokens)])


def test_examples_contain_no_code_with_its_diagnosis_and_no_prompt_or_answer_of_the_task(rows: list[dict]) -> None:
    code_of = {condition.label: condition.code for condition in CATALOGUE.common.values()}
    named = 0
    for row in rows:
        system, user, answer = (message["content"] for message in row["messages"])
        assert SYSTEM_PROMPT not in system and USER_PROMPT.partition("{")[0] not in user
        assert "Codes CIM 10 retenus" not in answer
        if "Répétez" in user or "à recopier" in user:
            continue
        given = {diagnosis.code for diagnosis in parse_answer(answer)}
        assert given and not given & set(CATALOGUE.common)
        named += sum(label in answer for label in code_of)
    assert named > len(rows)


def test_each_diagnosis_has_one_unique_number(rows: list[dict]) -> None:
    numbers: dict[str, set[str]] = {}
    for row in rows:
        user, answer = (message["content"] for message in row["messages"][1:])
        if user.startswith("Donnez le nom complet"):
            for item in answer.removesuffix(".").split(" ; "):
                label, _, number = item.rpartition(" (")
                numbers.setdefault(label, set()).add(number)
    assert len(numbers) > 50 and all(len(found) == 1 for found in numbers.values())
    assert len({next(iter(found)) for found in numbers.values()}) == len(numbers)


def test_examples_start_with_single_terms_and_end_with_notes(rows: list[dict]) -> None:
    lengths = [len(row["messages"][1]["content"]) for row in rows]
    assert np.mean(lengths[:40]) < np.mean(lengths[60:100]) < np.mean(lengths[-200:]) / 2


def test_examples_are_seeded(rows: list[dict]) -> None:
    again = list(PretrainingExamples(CATALOGUE, seed=0).rows(400))
    other = list(PretrainingExamples(CATALOGUE, seed=1).rows(400))
    assert again == rows != other


def test_a_table_with_other_diagnoses_does_not_change_the_examples(rows: list[dict]) -> None:
    other = dataclasses.replace(CATALOGUE.common["J189"], code="A481", label="Maladie des légionnaires")
    assert list(PretrainingExamples(Catalogue(CATALOGUE.common, (other,)), seed=0).rows(400)) == rows


def test_training_converges_and_is_seeded() -> None:
    weights = train_demo_model(ARGS, samples(steps=40), seed=0)
    assert logits(weights, [20, 21, 22, 23, 24, 25, 26])[3:].argmax(-1).tolist() == [24, 25, 26, 27]
    again = train_demo_model(ARGS, samples(steps=40), seed=0)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    other = train_demo_model(ARGS, samples(steps=40), seed=1)
    assert not torch.equal(weights["norm.weight"], other["norm.weight"])


def test_only_masked_tokens_are_trained() -> None:
    ignored = [dataclasses.replace(sample, masks=[False] * 8 + [True] * 4) for sample in samples(steps=40)]
    weights = train_demo_model(ARGS, ignored, seed=0)
    probabilities = logits(weights, list(range(20, 31))).softmax(-1)
    assert probabilities[10, 31] > 0.5 > 0.05 > probabilities[2, 23]


def test_unused_tokens_are_as_improbable_as_tokens_that_are_never_answered() -> None:
    weights = train_demo_model(ARGS, samples(steps=40), seed=0)
    found = logits(weights, list(range(22, 30)))[-1].softmax(-1)
    assert weights["output.weight"].shape == weights["tok_embeddings.weight"].shape == (200, 64)
    assert found[100:].sum() < 0.2
    assert torch.allclose(found[100:], found[100]) and weights["tok_embeddings.weight"][100:].std() > 0


def test_trained_folder_loads_and_runs(tmp_path: Path) -> None:
    make_demo_model(tmp_path / "model", demo_model_args(64, 1), seed=0, steps=2, catalogue=CATALOGUE)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        SAFETENSORS_NAME,
        "params.json",
        "tokenizer.model.v3",
    ]
    model, tokenizer = load_trained(tmp_path / "model")
    encoder = SampleEncoder(tokenizer)
    row = next(PretrainingExamples(CATALOGUE, seed=0).rows(1))
    prompt = encoder.encode_prompt(parse_conversation(row).messages[:-1])
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor(prompt), [len(prompt)])).all()


def test_weights_without_steps_are_random_and_seeded(tmp_path: Path) -> None:
    args = demo_model_args(64, 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo_model(tmp_path / name, args, seed)
    assert json.loads((tmp_path / "a/params.json").read_text(encoding="utf-8")) == dataclasses.asdict(args)
    assert (
        MistralTokenizer.from_file(str(tmp_path / "a/tokenizer.model.v3")).instruct_tokenizer.tokenizer.n_words == 32768
    )
    a, b, c = (open_safetensors(tmp_path / name / SAFETENSORS_NAME).read("output.weight") for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.float().std().item() == pytest.approx(64**-0.5, rel=0.02)
    with pytest.raises(UserError, match="not an empty folder"):
        make_demo_model(tmp_path / "a", args, 0)
