"""The exported grammar accepts the answers of our constrained decoding, and no others; llguidance is the judge."""

import random
from pathlib import Path

import llguidance
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from tests.support.golden import GOLDEN
from utils import export_grammar
from utils.icd10.answer_grammar import answer_grammar, as_gbnf, as_lark
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.constrained_decoding import AnswerGrammar

TABLE = Cim10Table(
    [
        Cim10Entry("I10", 0, "Hypertension essentielle (primitive)"),
        Cim10Entry("I11", 3, "Cardiopathie hypertensive"),
        Cim10Entry("E119", 0, "Diabète sucré de type 2, sans complication"),
        Cim10Entry("E1190", 0, "Diabète sucré de type 2 insulinotraité, sans complication"),
        Cim10Entry("Z511", 4, 'Séance de "chimiothérapie" pour tumeur \\ autre'),
        Cim10Entry("Z515", 0, "Soins palliatifs"),
        Cim10Entry("X59", 2, "Exposition à des facteurs sans précision"),
    ]
)
EOS = 256
LIMITS = {"initial_lexer_fuel": 200_000_000, "max_grammar_size": 50_000_000}  # the complete CIM-10 needs more


class Bytes:
    """A tokenizer with one token per byte."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(EOS)), b"</s>")
    special_token_ids = (EOS,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def judge(lark: str) -> llguidance.LLMatcher:
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(tokenizer, lark, limits=limits)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def judged(matcher: llguidance.LLMatcher, text: bytes) -> tuple[int, bool]:
    """Return how many bytes of a text can begin an answer, and whether all of it is one."""
    matcher.reset()
    accepted = matcher.try_consume_tokens(list(text))
    return accepted, accepted == len(text) and matcher.is_accepting()


def test_the_model_chooses_the_tokens_of_what_the_grammar_determines() -> None:
    lark = as_lark(answer_grammar(TABLE))
    assert judge(lark).compute_ff_tokens() == []
    assert judge(lark.partition("\n")[2]).compute_ff_tokens() != []


def ours(grammar: AnswerGrammar, text: bytes) -> tuple[int, bool]:
    states = grammar.start
    for position, byte in enumerate(text):
        following = grammar.following(states)
        if byte not in following:
            return position, False
        states = following[byte]
    return len(text), grammar.may_end(states)


def our_answer(grammar: AnswerGrammar, rng: random.Random) -> bytes:
    states, written = grammar.start, bytearray()
    while not (grammar.may_end(states) and rng.random() < 0.5):
        following = grammar.following(states)
        if not following:
            break
        byte = rng.choice(sorted(following))
        written.append(byte)
        states = following[byte]
    return bytes(written)


def their_answer(matcher: llguidance.LLMatcher, rng: random.Random) -> bytes:
    matcher.reset()
    written, mask = bytearray(), allocate_token_bitmask(1, EOS + 1)
    while not (matcher.is_accepting() and rng.random() < 0.5):
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:EOS])
        if not len(allowed):
            break
        byte = int(rng.choice(allowed))
        written.append(byte)
        matcher.consume_token(byte)
    return bytes(written)


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Return the text with a byte changed, left out or doubled, or a part of it moved."""
    at, other = rng.randrange(len(text)), rng.randrange(len(text))
    return rng.choice(
        [
            text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
            text[:at] + text[at + 1 :],
            text[:at] + text[at : at + 1] + text[at:],
            text[: min(at, other)] + text[max(at, other) :],
            text[:at],
        ]
    )


@pytest.fixture(scope="module")
def both() -> tuple[AnswerGrammar, llguidance.LLMatcher]:
    return AnswerGrammar(TABLE), judge(as_lark(answer_grammar(TABLE)))


@given(st.integers(0, 2**64).map(random.Random))
def test_both_accept_the_same_strings(both: tuple[AnswerGrammar, llguidance.LLMatcher], rng: random.Random) -> None:
    grammar, matcher = both
    for text in (our_answer(grammar, rng), their_answer(matcher, rng)):
        assert judged(matcher, text) == ours(grammar, text) == (len(text), True)
        wrong = damaged(text, rng)
        assert judged(matcher, wrong) == ours(grammar, wrong), wrong


@pytest.mark.skipif(GOLDEN is None, reason="needs the complete reference data")
def test_both_accept_the_same_strings_over_the_complete_cim10() -> None:
    table = Cim10Table.from_file(Path(GOLDEN).parent / "icd" / "cim_10_atih_2019.tsv")
    grammar, matcher, rng = AnswerGrammar(table), judge(as_lark(answer_grammar(table))), random.Random(0)
    for _ in range(100):
        for text in (our_answer(grammar, rng), their_answer(matcher, rng)):
            assert judged(matcher, text) == ours(grammar, text) == (len(text), True)
            wrong = damaged(text, rng)
            assert judged(matcher, wrong) == ours(grammar, wrong), wrong


def test_command_writes_both_formats(tmp_path: Path, run_command) -> None:
    table = tmp_path / "cim10.tsv"
    lines = ["code\ttype_mco\tlabel", "I10\t0\tHTA", 'X59\t2\tChute "grave"', "Z511\t0\tChimio"]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, output = run_command(export_grammar, "--cim10", table, "--out", tmp_path / "a.lark")
    assert f", {(tmp_path / 'a.lark').stat().st_size / 1e3:.1f} kB" in output
    assert code == 0 and "2 texts of DP, 2 texts of DR, 3 texts of DAS" in output
    assert 'DAS: "HTA (I10)" | "Chute \\"grave\\" (X59)" | "Chimio (Z511)"' in (tmp_path / "a.lark").read_text(
        encoding="utf-8"
    )
    assert run_command(export_grammar, "--cim10", table, "--out", tmp_path / "a.gbnf")[0] == 0
    assert 'dp-without-dr ::= ("HTA (I10)") (before-dr-of-dp-without-dr)' in (tmp_path / "a.gbnf").read_text(
        encoding="utf-8"
    )
    code, output = run_command(export_grammar, "--cim10", table, "--out", tmp_path / "a.txt")
    assert code == 1 and "expected a name that ends in .lark or .gbnf" in output


def test_llguidance_reads_llama_cpps_format_as_the_same_language() -> None:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    matcher = llguidance.LLMatcher(tokenizer, gbnf_to_lark(as_gbnf(answer_grammar(TABLE))))
    answer = build_answer([Diagnosis("DP", "I10", TABLE.label("I10")), Diagnosis("DAS", "X59", TABLE.label("X59"))])
    assert judged(matcher, answer.encode()) == (len(answer.encode()), True)
    assert not judged(matcher, answer.replace("X59", "I11").encode())[1]
