"""Constrained answers break no forbidding rule, and every answer that breaks none can be given."""

import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generate import collect_tokens, stream
from model.sampling import Sampling
from tests.model.test_generate import tiny_model
from utils.icd10.answer_grammar import answer_grammar
from utils.icd10.answers import Diagnosis, build_answer, list_codes, parse_answer
from utils.icd10.codes import ROLES, Cim10Entry, Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.predictions import Prediction
from utils.icd10.prompts import ANSWER
from utils.icd10.rule_kinds import Types
from utils.icd10.rules import RuleSet, guide_rules
from utils.icd10.rules_file import FORBIDDEN, GUIDE

EOS = 256
BYTES = [bytes([byte]) for byte in range(EOS)]
RULES = guide_rules().rules

# Labels that begin alike, of codes that exclude each other. An item begins with another: it is read as both.
LABELS = {
    "B200": "Maladie par VIH",
    "Z21": "Maladie par VIH, infection",
    "E1140": "Diabète",
    "E1148": "Diabète sucré",
    "E440": "Malnutrition",
    "E43": "aucun apport",
    "C169": "Tumeur",
    "C169+0": "Tumeur maligne",
    "Z511": "Séance",
    "I10": "Hypertension",
    "I119": "Hypertension (I10), cardiaque",
}
TABLE = Cim10Table(Cim10Entry(code, 0, label) for code, label in LABELS.items())


DAS = [Diagnosis("DAS", code) for code in LABELS]


def vocabulary_of(pieces: Sequence[bytes]) -> Vocabulary:
    return Vocabulary([*BYTES, None, *pieces], EOS)


def pieces_of(texts: Sequence[str], rng: random.Random, count: int) -> list[bytes]:
    """Return random parts of texts, also such that end an item and begin another."""
    found = set()
    for _ in range(count):
        text = rng.choice(texts).encode()
        start = rng.randrange(len(text))
        found.add(text[start : start + rng.randrange(2, 16)])
    return sorted(found)


def items(coding: Sequence[Diagnosis]) -> list[Diagnosis]:
    return [Diagnosis(item.role, item.code, TABLE.label(item.code) or "") for item in coding]


def breaks_forbidding(coding: Sequence[Diagnosis]) -> list[str]:
    return [name for name in guide_rules().broken(coding, TABLE) if RULES[name].severity == FORBIDDEN]


def valid_answers(rng: random.Random, count: int) -> list[str]:
    """Return random answers that break no forbidding rule."""
    found: list[str] = []
    while len(found) < count:
        codes = rng.choices(list(LABELS), k=rng.randrange(2, 7))
        roles = ["DP", rng.choice(["DR", "DAS"]), *["DAS"] * len(codes)]
        coding = guide_rules().repaired(items(list(map(Diagnosis, roles, codes))), TABLE)[0]
        if not {"I119", "I10"} <= {item.code for item in coding}:
            assert not breaks_forbidding(coding)
            found.append(build_answer(coding))
    return found


def write(constraint: AnswerConstraint, vocabulary: Vocabulary, text: bytes, rng: random.Random) -> bool:
    """Write a text with random tokens that are allowed; return whether it can be written and ended."""
    pieces = vocabulary.pieces
    while text:
        fitting = [token for token in constraint.allowed() if token != EOS and text.startswith(pieces[token])]
        if not fitting:
            return False
        token = rng.choice(fitting)
        constraint.take(token)
        text = text.removeprefix(pieces[token])
    return EOS in constraint.allowed()


@settings(max_examples=settings.default.max_examples // 5)
@given(st.integers(0, 2**64).map(random.Random))
def test_valid_answers_can_be_written_whatever_the_tokens(rng: random.Random) -> None:
    answers = valid_answers(rng, 10)
    vocabulary = vocabulary_of(pieces_of(answers, rng, 60))
    grammar = AnswerGrammar(TABLE)
    for answer in answers:
        assert write(AnswerConstraint(grammar, vocabulary), vocabulary, answer.encode(), rng), answer


@settings(max_examples=settings.default.max_examples // 5)
@given(st.integers(0, 2**64).map(random.Random))
def test_random_tokens_break_no_forbidding_rule(rng: random.Random) -> None:
    vocabulary = vocabulary_of(pieces_of(valid_answers(rng, 10), rng, 60))
    grammar = AnswerGrammar(Cim10Table(entry for entry in TABLE if entry.code != "I119"))
    for _ in range(3):
        constraint = AnswerConstraint(grammar, vocabulary)
        for _ in range(rng.randrange(400)):
            allowed = constraint.allowed()
            assert len(allowed) and (np.diff(allowed) > 0).all()
            if EOS in allowed and rng.random() < 0.1:
                break
            constraint.take(rng.choice([token for token in allowed if token != EOS] or [EOS]))
        assert breaks_forbidding(parse_answer(constraint.text)) in ([], ["no_DP"])
        assert constraint.text.count("(") < 3 or parse_answer(constraint.text)


@settings(max_examples=settings.default.max_examples // 5)
@given(st.integers(0, 2**64).map(random.Random))
def test_allowed_tokens_are_those_that_lead_on(rng: random.Random) -> None:
    """Compare with trying every token, but for those that end an item and begin another, which are never allowed."""
    vocabulary = vocabulary_of(pieces_of(valid_answers(rng, 10), rng, 80))
    grammar, letters = AnswerGrammar(TABLE), set(text_of(items(DAS)).encode())
    constraint = AnswerConstraint(grammar, vocabulary)
    for _ in range(60):
        allowed = set(constraint.allowed().tolist())
        states, bans = constraint._states, constraint._bans
        for token, piece in enumerate(vocabulary.pieces):
            if token < EOS and token not in letters:
                continue
            if piece is None:
                assert (token in allowed) == grammar.may_end(states)
                continue
            reached, ended, begins_another = states, False, False
            for byte in piece:
                reached = grammar.step(reached, byte, bans)
                begins_another = begins_another or (ended and grammar.in_item(reached))
                ended = ended or grammar.at_item_end(reached)
            assert (token in allowed) == (bool(reached) and not begins_another), piece
        if allowed == {EOS}:
            break
        constraint.take(rng.choice(sorted(allowed - {EOS})))


# --- The rules of the file --------------------------------------------------------------------------------------------


def text_of(coding: Sequence[Diagnosis]) -> str:
    """Return the sentence of a coding, also of one that `build_answer` refuses."""
    return ANSWER.format(**{role: list_codes(item for item in coding if item.role == role) for role in ROLES})


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_decoding_refuses_what_breaks_a_forbidding_rule(rule) -> None:
    vocabulary, rng = vocabulary_of([]), random.Random(0)
    grammar = AnswerGrammar(rule.example_table())
    for example, is_allowed in ((rule.breaks, rule.severity != FORBIDDEN), (rule.passes, True)):
        constraint = AnswerConstraint(grammar, vocabulary)
        assert write(constraint, vocabulary, text_of(example.coding).encode(), rng) == is_allowed


def test_every_forbidding_rule_of_the_guide_is_enforced() -> None:
    assert guide_rules().not_enforced() == []


def test_a_session_must_have_a_dr_where_a_file_forbids_others(tmp_path) -> None:
    text = GUIDE.read_text(encoding="utf-8").replace('"to check"  # a DR is due', '"forbidden"  #')
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    rules = RuleSet.from_file(tmp_path / "own.toml")
    assert rules.not_enforced() == []
    grammar, vocabulary, rng = AnswerGrammar(TABLE, rules=rules), vocabulary_of([]), random.Random(0)
    for text, is_allowed in (("DP:Z511", False), ("DP:Z511 DR:C169", True), ("DP:Z21", True), ("DP:I10", True)):
        coding = items([Diagnosis(*part.split(":")) for part in text.split()])
        written = write(AnswerConstraint(grammar, vocabulary), vocabulary, text_of(coding).encode(), rng)
        assert written == is_allowed, text
    # Without any DR that the DP allows, a rule that wants one would leave no answer: it is only checked.
    alone, answer = AnswerGrammar(Cim10Table([TABLE.get("Z511")]), rules=rules), items([Diagnosis("DP", "Z511")])
    assert write(AnswerConstraint(alone, vocabulary), vocabulary, text_of(answer).encode(), rng)


def test_rules_that_decoding_cannot_enforce_are_named(tmp_path) -> None:
    text = GUIDE.read_text(encoding="utf-8").replace('"to check"', '"forbidden"')
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    expected = ["asterisk_without_dagger", "injury_without_cause", "wrong_sex", "wrong_age"]
    assert RuleSet.from_file(tmp_path / "own.toml").not_enforced() == expected


def test_answers_of_other_engines_are_repaired() -> None:
    grammar = AnswerGrammar(TABLE)
    das = [Diagnosis("DAS", code) for code in ("Z21", "I10", "I10", "E43", "E440")]
    broken = items([Diagnosis("DP", "B200"), *das])
    expected = build_answer(items([Diagnosis("DP", "B200"), Diagnosis("DAS", "I10"), Diagnosis("DAS", "E43")]))
    assert grammar.accepted(build_answer(broken), is_complete=True) == expected
    assert grammar.accepted(expected, is_complete=True) == expected
    assert grammar.accepted(expected[:-3], is_complete=False) == expected.removesuffix(", aucun apport (E43)")
    assert grammar.accepted(text_of(items([Diagnosis("DP", "I10"), Diagnosis("DR", "E43")])), is_complete=True) is None


def test_sampled_answers_of_an_untrained_model_break_no_forbidding_rule() -> None:
    """`python -m benchmarks.generate --answers 10000` does the same with the demo's table and tokenizer."""
    table = Cim10Table(entry for entry in TABLE if entry.code != "I119")
    texts = {text for node in answer_grammar(table).values() for text in node.texts}
    words = {word for text in texts for word in re.findall(r"\S+ ?", text)}
    vocabulary = Vocabulary([*[None] * EOS, None, *(word.encode() for word in sorted(words | {" "}))], EOS)
    types = RuleSet("types", [rule for rule in RULES.values() if isinstance(rule.condition, Types)])
    model, sampling = tiny_model(vocab_size=len(vocabulary.pieces)), Sampling(30.0)
    breaking = {}
    for rules, count in ((guide_rules(), 500), (types, 100)):
        grammar = AnswerGrammar(table, rules=rules)
        constraints = [AnswerConstraint(grammar, vocabulary) for _ in range(count)]
        collect_tokens(stream(model, [[1]] * count, 40, EOS, sampling, range(count), constraints))
        found = [Prediction.of_answer(constraint.text) for constraint in constraints]
        assert len({constraint.text for constraint in constraints}) > count // 2
        breaking[rules.version] = sum(bool(breaks_forbidding(answer.diagnoses) or answer.repeated) for answer in found)
    assert breaking[guide_rules().version] == 0 < breaking["types"]
