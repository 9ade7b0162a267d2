"""Generation with a cache matches generation without, and constraints hold for any model."""

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import token_bytes
from model.args import ModelArgs, MoeArgs
from model.generate import answers, collect_tokens, filtered_probabilities, stream
from model.sampling import Sampling
from model.transformer import Transformer
from tests.support.golden import GOLDEN, instruct_tokenizer
from utils.icd10.answers import Diagnosis, build_answer, parse_answer
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.prompts import instruct_row
from utils.icd10.rules import guide_rules

EOS = 2


def tiny_model(moe: bool = False, vocab_size: int = 300) -> Transformer:
    torch.manual_seed(0)
    args = ModelArgs(
        dim=32,
        n_layers=2,
        head_dim=8,
        hidden_dim=48,
        n_heads=4,
        n_kv_heads=2,
        norm_eps=1e-5,
        vocab_size=vocab_size,
        moe=MoeArgs(4, 2) if moe else None,
    )
    model = Transformer(args)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompts_of(lengths: list[int], vocab_size: int = 300) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy_without_cache(model: Transformer, prompt: list[int], max_tokens: int, eos: int = EOS) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and tokens[-1:] != [eos]:
        tokens.append(int(model(torch.tensor(tokens), [len(tokens)])[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("moe", [False, True])
def test_generation_matches_generation_without_cache(moe: bool) -> None:
    model = tiny_model(moe)
    prompts = prompts_of([5, 17, 1, 40])
    expected = [greedy_without_cache(model, prompt, 15) for prompt in prompts]
    assert collect_tokens(stream(model, prompts, 15, EOS)) == expected


@pytest.mark.parametrize("rests", [[3, 9, 1], [0, 4, 0], [0, 0]])
def test_common_prefix_does_not_change_the_output(rests: list[int]) -> None:
    model = tiny_model()
    prefix, *others = prompts_of([20, *(rest for rest in rests if rest)])
    prompts = [prefix + (others.pop() if rest else []) for rest in rests]
    expected = [greedy_without_cache(model, prompt, 15) for prompt in prompts]
    assert collect_tokens(stream(model, prompts, 15, EOS)) == expected


class Agreement:
    """Ranks that share a model: this one runs as many steps as the one with the most, and one for the prefix."""

    def __init__(self, steps: int) -> None:
        self._left = steps + 1

    def __call__(self, active: bool) -> bool:
        self._left -= 1
        return self._left >= 0


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The number of tokens of each document in each forward pass."""
    found: list[list[int]] = []
    forward = Transformer.forward

    def recorded(self: Transformer, ids: torch.Tensor, documents: Any, **options: Any) -> torch.Tensor:
        found.append(documents if isinstance(documents, list) else documents.lengths)
        return forward(self, ids, documents, **options)

    monkeypatch.setattr(Transformer, "forward", recorded)
    return found


@pytest.mark.parametrize("places", [1, 2, 5])
def test_all_ranks_run_the_same_number_of_steps_with_or_without_prompts_and_common_prefix(
    places: int, passes: list[list[int]]
) -> None:
    model = tiny_model()
    for prompts in ([], prompts_of([20]), prompts_of([20, 5]), [prompts_of([20])[0]] * 3):
        expected = [greedy_without_cache(model, prompt, 8, eos=-1) for prompt in prompts]
        passes.clear()
        assert collect_tokens(stream(model, prompts, 8, -1, any_active=Agreement(30), places=places)) == expected
        assert len(passes) == 31


def test_each_sequence_stops_at_its_own_eos() -> None:
    model = tiny_model()
    prompts = prompts_of([4, 6, 9, 3, 12])
    free = [greedy_without_cache(model, prompt, 12, eos=-1) for prompt in prompts]
    eos = free[0][3]  # a token that the first sequence generates early
    outputs = collect_tokens(stream(model, prompts, 12, eos))
    for output, tokens in zip(outputs, free):
        cut = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert output == tokens[:cut]


def test_generation_restores_the_model() -> None:
    model = tiny_model().train()
    engines = [layer.attention.engine for layer in model.layers]
    collect_tokens(stream(model, prompts_of([3]), 2, EOS))
    assert model.training
    assert [layer.attention.engine for layer in model.layers] == engines


def test_prompt_equals_the_tokens_before_the_trained_answer() -> None:
    encoder = SampleEncoder(instruct_tokenizer("v3"))
    row = instruct_row("Patient de 70 ans, HTA.", "Codes CIM 10", "1")
    sample = encoder.encode_conversation(parse_conversation(row))
    prompt = encoder.encode_prompt(parse_conversation(row).messages[:-1])
    first_trained = sample.masks.index(True)
    assert prompt == sample.tokens[:first_trained]


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch() -> None:
    model, prompts = tiny_model(), prompts_of([5, 9, 3])
    sampling = Sampling(temperature=2.0, top_k=50, top_p=0.95)
    together = collect_tokens(stream(model, prompts, 12, -1, sampling, seeds=[7, 8, 9]))
    assert [
        collect_tokens(stream(model, [prompt], 12, -1, sampling, [seed]))[0] for prompt, seed in zip(prompts, (7, 8, 9))
    ] == together
    assert collect_tokens(stream(model, prompts, 12, -1, sampling, seeds=[7, 8, 10]))[2] != together[2]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.5, top_p=0.6), Sampling(0.9, 20, 0.8)], ids=str
)
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    from transformers.generation import logits_process as filters

    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * 3
    expected = filters.TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        expected = filters.TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = filters.TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(filtered_probabilities(logits, sampling), expected.softmax(-1))


def test_tokens_are_yielded_as_they_are_chosen() -> None:
    model, prompts = tiny_model(), prompts_of([4, 6])
    whole = collect_tokens(stream(model, prompts, 10, EOS))
    steps = stream(model, prompts, 10, EOS)
    begun = [{index: step.token for index, step in next(steps).items()} for _ in range(2)]
    assert begun == [dict(enumerate(column)) for column in list(zip(*whole))[:2]]
    steps.close()
    assert collect_tokens(stream(model, prompts, 10, EOS)) == whole  # the model is as before


# --- More prompts than places ----------------------------------------------------------------------------------------


def test_the_next_prompt_takes_the_place_of_one_that_has_ended(passes: list[list[int]]) -> None:
    model, limit = tiny_model(), 12
    prompts = prompts_of([4, 6, 9, 3, 12, 5, 7])
    free = [greedy_without_cache(model, prompt, limit, eos=-1) for prompt in prompts]
    eos = free[0][3]
    expected = [greedy_without_cache(model, prompt, limit, eos) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    passes.clear()
    steps = list(stream(model, prompts, limit, eos, places=2))
    assert collect_tokens(steps) == expected
    busy_until = [0, 0]
    for answer in expected:
        busy_until[busy_until.index(min(busy_until))] += len(answer)
    assert len(passes) == len(steps) == max(busy_until)
    assert all(len(documents) <= 2 for documents in passes)
    assert sum(map(sum, passes)) == sum(map(len, prompts)) + sum(len(answer) - 1 for answer in expected)


def test_the_common_prefix_is_computed_once_for_all_prompts(passes: list[list[int]]) -> None:
    model = tiny_model()
    prefix, *rests = prompts_of([50, 3, 8, 1, 5, 30, 2])
    other = prompts_of([61])[0][40:]  # shares nothing
    prompts = [prefix + rest for rest in rests] + [other, prefix[:20], prefix]
    expected = [greedy_without_cache(model, prompt, 6, eos=-1) for prompt in prompts]
    passes.clear()
    assert collect_tokens(stream(model, prompts, 6, -1, places=3)) == expected
    own = [*map(len, rests), len(other), 1, 1]  # of a prompt within the prefix, the last token
    assert passes[0] == [50]
    assert sum(map(sum, passes[1:])) == sum(own) + 5 * len(prompts)


def test_one_long_prompt_among_short_ones_does_not_change_the_output() -> None:
    model = tiny_model()
    prompts = prompts_of([5, 9, 700, 4, 6, 8])
    expected = [greedy_without_cache(model, prompt, 10) for prompt in prompts]
    for places in (1, 2, 3):
        assert collect_tokens(stream(model, prompts, 10, EOS, places=places)) == expected


def test_prompts_that_enter_at_once_have_a_bounded_number_of_tokens(
    passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.generate._ENTERING_TOKENS", 20)
    model, prompts = tiny_model(), prompts_of([10, 10, 1, 15, 30, 5, 5])
    expected = [greedy_without_cache(model, prompt, 4, eos=-1) for prompt in prompts]
    passes.clear()
    assert collect_tokens(stream(model, prompts, 4, -1)) == expected
    assert passes[:5] == [[10, 10], [1, 1, 1, 15], [1, 1, 1, 1, 30], [1, 1, 1, 1, 1, 5, 5], [1, 1, 1, 1, 1]]


def test_prompts_are_taken_as_places_become_free() -> None:
    model, taken = tiny_model(), []
    prompts = (taken.append(1) or prompt for prompt in prompts_of([5] * 20))
    for done, (_, answer) in enumerate(answers(stream(model, prompts, 3, -1, places=2)), start=1):
        assert len(answer) == 3
        assert len(taken) <= min(20, done + 5)
    assert done == 20


def test_sampled_and_constrained_answers_do_not_depend_on_the_places() -> None:
    vocabulary, grammar = vocabulary_of("v3"), AnswerGrammar(TABLE, prefix=" ")
    model, prompts = tiny_model(vocab_size=len(vocabulary.pieces)), prompts_of([5, 9, 3, 7, 30])
    found = []
    for places in (1, 2, 5):
        constraints = [AnswerConstraint(grammar, vocabulary) for _ in prompts]
        steps = stream(model, prompts, 150, vocabulary.eos_id, Sampling(30.0), range(5), constraints, places=places)
        found.append((collect_tokens(steps), [constraint.text for constraint in constraints]))
    assert found[0] == found[1] == found[2]
    assert len(set(map(len, found[0][0]))) > 1


# --- Constrained answers ----------------------------------------------------------------------------------------------

TABLE = Cim10Table(
    [
        Cim10Entry("I10", 0, "Hypertension essentielle (primitive)"),
        Cim10Entry("I11", 3, "Cardiopathie hypertensive"),
        Cim10Entry("E119", 0, "Diabète sucré de type 2, sans complication"),
        Cim10Entry("E1190", 0, "Diabète sucré de type 2 insulinotraité, sans complication"),
        Cim10Entry("Z511", 4, "Séance de chimiothérapie pour tumeur"),
        Cim10Entry("Z515", 0, "Soins palliatifs"),
        Cim10Entry("X59", 2, "Exposition à des facteurs sans précision"),
    ]
)


@functools.cache
def vocabulary_of(name: str) -> Vocabulary:
    tokenizer = instruct_tokenizer(name)
    return Vocabulary(token_bytes(tokenizer), tokenizer.tokenizer.eos_id)


@pytest.fixture(scope="module", params=[False, True], ids=["sentencepiece", "tekken"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return vocabulary_of("tekken" if request.param else "v3")


def random_answer(grammar: AnswerGrammar, vocabulary: Vocabulary, rng: random.Random, limit: int) -> str:
    constraint = AnswerConstraint(grammar, vocabulary)
    for _ in range(limit):
        token = rng.choice(constraint.allowed())
        if token == vocabulary.eos_id:
            break
        constraint.take(token)
    return constraint.text


def assert_allowed(answer: str, table: Cim10Table) -> None:
    for diagnosis in parse_answer(answer):
        assert diagnosis.role is not None
        assert guide_rules().allows(diagnosis.role, table.get(diagnosis.code)), answer


@pytest.mark.slow
def test_random_tokens_form_only_codes_from_the_table(vocabulary: Vocabulary) -> None:
    grammar, rng = AnswerGrammar(TABLE), random.Random(0)
    answers = [random_answer(grammar, vocabulary, rng, limit=rng.choice([60, 150, 400])) for _ in range(60)]
    for answer in answers:
        assert_allowed(answer, TABLE)
    assert any(parse_answer(answer) for answer in answers)


@pytest.mark.slow
def test_hundreds_of_sampled_answers_are_valid_and_diverse(vocabulary: Vocabulary) -> None:
    grammar, model = AnswerGrammar(TABLE), tiny_model(vocab_size=len(vocabulary.pieces))
    constraints = [AnswerConstraint(grammar, vocabulary) for _ in range(300)]
    outputs = collect_tokens(
        stream(model, [[1]] * 300, 150, vocabulary.eos_id, Sampling(30.0), range(300), constraints)
    )
    assert len({tuple(output) for output in outputs}) == 300
    assert sum(output[-1] == vocabulary.eos_id for output in outputs) > 30
    found = [parse_answer(constraint.text) for constraint in constraints]
    assert all(found)
    assert {item.code for items in found for item in items} == {"I10", "E119", "E1190", "Z511", "Z515", "X59"}
    for constraint in constraints:
        assert_allowed(constraint.text, TABLE)


def test_grammar_accepts_every_answer_of_data_preparation(vocabulary: Vocabulary) -> None:
    grammar = AnswerGrammar(TABLE)
    dp = Diagnosis("DP", "I10", "Hypertension essentielle (primitive)")
    dr = Diagnosis("DR", "Z511", "Séance de chimiothérapie pour tumeur")
    das = [
        Diagnosis("DAS", "E119", "Diabète sucré de type 2, sans complication"),
        Diagnosis("DAS", "X59", TABLE.label("X59")),
    ]
    care = Diagnosis("DP", "Z515", "Soins palliatifs")
    for diagnoses in ([dp], [care], [care, dr], [dp, *das], [care, dr, *das]):
        states = grammar.start
        for byte in build_answer(diagnoses).encode():
            states = grammar.following(states)[byte]
        assert grammar.may_end(states)


@pytest.mark.skipif(GOLDEN is None, reason="needs the complete reference data")
def test_random_answers_over_the_complete_cim10() -> None:
    """Choose randomly among the allowed tokens, like an untrained model."""
    table = Cim10Table.from_file(Path(GOLDEN).parent / "icd" / "cim_10_atih_2019.tsv")
    vocabulary, grammar, rng = vocabulary_of("v3"), AnswerGrammar(table, prefix=" "), random.Random(0)
    for _ in range(200):
        assert_allowed(random_answer(grammar, vocabulary, rng, limit=120), table)


def test_log_probabilities_are_those_of_the_model() -> None:
    model, (prompt,) = tiny_model(), prompts_of([6])
    for sampling in (Sampling(), Sampling(temperature=2.0, top_k=9)):
        steps = [chosen[0] for chosen in stream(model, [prompt], 8, -1, sampling)]
        tokens = [*prompt, *(step.token for step in steps)]
        with torch.no_grad():
            logits = model(torch.tensor(tokens[:-1]), [len(tokens) - 1]).log_softmax(-1)[len(prompt) - 1 :]
        expected = [float(row[step.token]) for row, step in zip(logits, steps)]
        assert [step.log_probability for step in steps] == pytest.approx(expected, abs=1e-4)
