"""Sentencepiece that remembers how words are encoded: the same tokens, several times faster on natural language.

A sentencepiece BPE model joins neighbouring pieces only into pieces of its vocabulary. Where no piece holds a blank
after something else, nor a line end, nothing is ever joined across the start of a word, so a text's tokens are those
of its words one after the other, and few words make up most of any text.
"""

import itertools
import re

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

_BLANK = "▁"  # how sentencepiece writes a space; it also puts one before the text
_WORDS = re.compile(r" +[^ \n]+|\n[^ \n]*| +")  # blanks belong to the word behind them
_REMEMBERED = 1 << 17  # words; some 40 MB
_LONGEST = 32  # characters of a word worth remembering
# Tokenizers that rewrite text (blanks trimmed, characters normalised) would encode this differently word by word.
_PROBE = "  Motif :  ﬁèvre e\u0301 \u0308½\n\n \tÀ l'entrée ,\u00a038,5 °C\u2028 \r\n<s> [INST]  "


class _WordTokens(dict[str, tuple[int, ...]]):
    """Words, with what stands before them, and their tokens."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        if word.startswith(" "):  # one space is what sentencepiece puts before any text
            tokens = self._encode(word[1:]) if word != " " else self._encode("\n")[:1]
        else:
            tokens = self._encode(word)[1:]
        if len(word) <= _LONGEST:
            if len(self) == _REMEMBERED:
                self.clear()
            self[word] = tokens
        return tokens

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(SentencePieceTokenizer.encode(self._tokenizer, text, bos=False, eos=False))


class WordCachingTokenizer(SentencePieceTokenizer):
    """Encodes as SentencePieceTokenizer does."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        super().__init__(tokenizer.file_path, tokenizer.version)
        self._word_tokens = _WordTokens(self)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        if not s or _BLANK in s:
            return super().encode(s, bos, eos)
        words = _WORDS.findall(f" {s}")
        tokens = list(itertools.chain.from_iterable(map(self._word_tokens.__getitem__, words)))
        return [self.bos_id] * bos + tokens + [self.eos_id] * eos

    def encodes_words_apart(self) -> bool:
        """Whether a text's tokens are its words' tokens with this vocabulary."""
        if any(re.search(rf"[^{_BLANK}]{_BLANK}|\n", piece) for piece in self.vocab()):
            return False
        return self.encode(_PROBE, bos=True, eos=True) == super().encode(_PROBE, bos=True, eos=True)


def cache_words(instruct_tokenizer: InstructTokenizerBase) -> None:
    """Makes a sentencepiece tokenizer remember words; leaves others, and those it cannot serve, as they are."""
    if type(instruct_tokenizer.tokenizer) is SentencePieceTokenizer:
        caching = WordCachingTokenizer(instruct_tokenizer.tokenizer)
        if caching.encodes_words_apart():
            instruct_tokenizer.tokenizer = caching
