"""Generation with a cache matches generation without, and constraints hold for any model."""

import functools
import random
from pathlib import Path

import pytest
import torch

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import token_bytes
from model.args import ModelArgs, MoeArgs
from model.generate import collect_tokens, filtered_probabilities, stream
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


def test_all_ranks_run_the_same_number_of_steps_with_or_without_common_prefix() -> None:
    model, steps = tiny_model(), []
    model.register_forward_hook(lambda *_: steps.append(1))
    for prompts in (prompts_of([20]), prompts_of([20, 5]), [prompts_of([20])[0]] * 2):
        expected = [greedy_without_cache(model, prompt, 8, eos=-1) for prompt in prompts]
        steps.clear()
        assert collect_tokens(stream(model, prompts, 8, -1, any_active=lambda _: True)) == expected
        assert len(steps) == 9


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
