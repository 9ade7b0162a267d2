"""Generated answers: one at a time and eight at once, against the CPU, and constrained to a table of codes."""

import math
from collections.abc import Iterator

import torch

from benchmarks.acceptance.check import Check, Setting
from benchmarks.generate import ConstraintFactory, prompts_of, untrained_model
from model.generate import collect_tokens, stream
from model.transformer import Transformer
from utils.fictional_notes.catalogue import load_catalogue
from utils.generate_notes import table_of
from utils.icd10.answers import parse_answer
from utils.icd10.rules import guide_rules

_NO_END = -1  # of an answer: every answer has all tokens
_NOTES, _TOKENS = 8, 12
_CONSTRAINED_NOTES, _CONSTRAINED_TOKENS = 2, 200


def generation(setting: Setting) -> Iterator[Check]:
    """Yield whether answers in fp32 are the same everywhere, those in bf16 finite, and constrained ones allowed."""
    prompts, model = prompts_of(_NOTES), untrained_model()
    expected = collect_tokens(stream(model, prompts, _TOKENS, _NO_END))
    model.to(setting.device)
    found = collect_tokens(stream(model, prompts, _TOKENS, _NO_END))
    yield _same("greedy answers in fp32 are the CPU's", found, expected)
    single = [answer for prompt in prompts for answer in collect_tokens(stream(model, [prompt], _TOKENS, _NO_END))]
    yield _same("greedy answers one at a time are those of eight at once", single, found)
    yield _constrained(model, prompts)
    model.to(torch.bfloat16).compute_dtype = torch.bfloat16
    steps = [step for chosen in stream(model, prompts, _TOKENS, _NO_END) for step in chosen.values()]
    finite = all(math.isfinite(step.log_probability) for step in steps)
    yield Check("probabilities in bf16 are finite", finite and len(steps) == _NOTES * _TOKENS)


def _same(title: str, found: list[list[int]], expected: list[list[int]]) -> Check:
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    passed = equal == len(expected)
    return Check(title, passed, {"equal": equal, "of": len(expected)}, "" if passed else "tokens differ")


def _constrained(model: Transformer, prompts: list[list[int]]) -> Check:
    table = table_of(load_catalogue())
    new_constraint = ConstraintFactory(table)
    constraints = [new_constraint() for _ in prompts[:_CONSTRAINED_NOTES]]
    prompts = prompts[: len(constraints)]
    collect_tokens(stream(model, prompts, _CONSTRAINED_TOKENS, new_constraint.eos_id, constraints=constraints))
    codes = [item for constraint in constraints for item in parse_answer(constraint.text)]
    wrong = sum(not (item.role and guide_rules().allows(item.role, table.get(item.code))) for item in codes)
    return Check("constrained answers have codes of the table only", not wrong, {"codes": len(codes), "wrong": wrong})
