"""The word cache changes no token."""

import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from finetune.data import word_cache
from finetune.data.word_cache import WordCachingTokenizer, cache_words
from tests.support.golden import fixture
from tests.support.tiny_tekken import load_tiny_tekken

PLAIN = MistralTokenizer.v3().instruct_tokenizer.tokenizer
SHARED = WordCachingTokenizer(PLAIN)  # keeps the words of earlier examples
# What could join words: whitespace of all kinds, sentencepiece's own space, and characters that it encodes as bytes.
PIECES = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", "▁", "é", "e\u0301", "\u00a0", "\u2028", "ﬁ", "J45.9", "l'", "漢"]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join)


@pytest.fixture
def caching() -> WordCachingTokenizer:
    return WordCachingTokenizer(PLAIN)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@example("½▁ ﬁ", True, True)
@given(text=TEXTS, bos=st.booleans(), eos=st.booleans())
def test_tokens_of_any_string_are_the_same(text, bos, eos):
    assert SHARED.encode(text, bos, eos) == PLAIN.encode(text, bos, eos)


@pytest.mark.parametrize("name", ["train_icd", "instruct", "function_calling", "pretrain"])
def test_tokens_of_real_files_are_the_same(name, caching):
    text = fixture(f"inputs/{name}.jsonl").read_text(encoding="utf-8")
    assert caching.encode(text, True, True) == PLAIN.encode(text, True, True)


def test_full_cache_is_cleared(caching, monkeypatch):
    monkeypatch.setattr(word_cache, "_REMEMBERED", 3)
    text = " ".join(f"mot{number}" for number in range(20))
    assert caching.encode(text, True, True) == PLAIN.encode(text, True, True)
    assert len(caching._word_tokens) <= 3


def test_long_words_are_not_cached(caching):
    caching.encode("x" * 1000, False, False)
    assert not caching._word_tokens


def test_tokenizer_can_be_pickled(caching):
    copy = pickle.loads(pickle.dumps(caching))
    assert copy.encode("Motif : chute\n", True, False) == PLAIN.encode("Motif : chute\n", True, False)


def test_v3_tokenizer_gets_a_cache():
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    cache_words(tokenizer)
    assert isinstance(tokenizer.tokenizer, WordCachingTokenizer)


@pytest.mark.parametrize("piece", ["de▁la", "a\n"])
def test_vocabulary_with_pieces_across_words_gets_no_cache(piece, monkeypatch):
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    monkeypatch.setattr(SentencePieceTokenizer, "vocab", lambda self: ["<s>", "▁▁", piece])
    cache_words(tokenizer)
    assert type(tokenizer.tokenizer) is SentencePieceTokenizer


def test_tokenizer_that_rewrites_strings_gets_no_cache(monkeypatch):
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, s, bos, eos: encode(self, " ".join(s.split()), bos, eos)
    )
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    cache_words(tokenizer)
    assert type(tokenizer.tokenizer) is SentencePieceTokenizer


def test_tekken_gets_no_cache(tmp_path):
    tokenizer = load_tiny_tekken(tmp_path, "v7").instruct_tokenizer
    before = tokenizer.tokenizer
    cache_words(tokenizer)
    assert tokenizer.tokenizer is before
