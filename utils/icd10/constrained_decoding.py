"""Constrained decoding: answers that can only contain codes of a table.

The grammar is that of `answer_grammar`, over bytes, so that every tokenization of a label can be generated.
"""

import bisect
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils.icd10.answer_grammar import END, ITEM_NODES, START, answer_grammar
from utils.icd10.codes import Cim10Table


class _State(NamedTuple):
    """A position in a node: the strings [low, high) of its sorted list start with the last `depth` bytes written."""

    node: str
    low: int
    high: int
    depth: int


States = frozenset[_State]


class AnswerGrammar:
    """A nondeterministic automaton over bytes.

    A node is a sorted list of strings, one of which must be written, and the nodes that may come next.
    """

    def __init__(self, table: Cim10Table, prefix: str = "") -> None:
        """Build the grammar of answers with codes of `table`.

        Args:
            table: allowed codes.
            prefix: start of every answer (SentencePiece starts a string with a space).
        """
        nodes = answer_grammar(table, [prefix])
        self._strings = {name: sorted({text.encode() for text in node.texts}) for name, node in nodes.items()}
        self._next_nodes = {name: node.following for name, node in nodes.items()}
        self.start = self._enter(START)
        after_items = {name for node in ITEM_NODES if node in nodes for name in nodes[node].following}
        self._item_ends = frozenset().union(*map(self._enter, after_items))

    def _enter(self, node: str) -> States:
        return frozenset([_State(node, 0, len(self._strings.get(node, ())), 0)])

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - a command builds one grammar and keeps it until it exits
    def following(self, states: States) -> Mapping[int, States]:
        """Return the bytes that may come next, each with the states it leads to."""
        reached: defaultdict[int, set[_State]] = defaultdict(set)
        for node, low, high, depth in states:
            strings = self._strings.get(node, ())
            while low < high:
                byte = strings[low][depth]
                end = bisect.bisect_right(strings, byte, low, high, key=lambda string: string[depth])
                if len(strings[low]) == depth + 1:  # the shortest string sorts first: it is complete after this byte
                    reached[byte].update(*(self._enter(entered) for entered in self._next_nodes[node]))
                    low += 1
                if low < end:
                    reached[byte].add(_State(node, low, end, depth + 1))
                low = end
        return {byte: frozenset(found) for byte, found in reached.items()}

    @staticmethod
    def may_end(states: States) -> bool:
        """Return whether the answer may end here."""
        return any(state.node == END for state in states)

    def at_item_end(self, states: States) -> bool:
        """Return whether an item has just been completed, so that the answer can be truncated here."""
        return not self._item_ends.isdisjoint(states)

    def accepted(self, answer: str, is_complete: bool) -> str | None:
        """Return an answer without an incomplete last item, or None if the grammar does not allow it.

        Args:
            answer: text by another engine.
            is_complete: whether the model ended it; otherwise the end of an allowed answer may be missing.
        """
        states, written, complete = self.start, answer.encode(), 0
        for length, byte in enumerate(written, start=1):
            states = self.following(states).get(byte, frozenset())
            if self.at_item_end(states):
                complete = length
        allowed = self.may_end(states) if is_complete else bool(states)
        return written[:complete].decode() if allowed else None


class _TrieNode:
    """A node of the trie of token bytes."""

    __slots__ = ("children", "tokens")

    def __init__(self) -> None:
        self.children: dict[int, _TrieNode] = {}
        self.tokens: list[int] = []  # ids of the tokens that end here


class Vocabulary:
    """The tokens of a tokenizer as a trie of their bytes."""

    def __init__(self, pieces: Sequence[bytes | None], eos_id: int) -> None:
        """Build the trie.

        Args:
            pieces: bytes of each token; None for tokens that produce no text, such as control tokens.
            eos_id: id of the token that ends an answer.
        """
        self.pieces = pieces
        self.eos_id = eos_id
        self._root = _TrieNode()
        for token, piece in enumerate(pieces):
            if piece:
                node = self._root
                for byte in piece:
                    node = node.children.setdefault(byte, _TrieNode())
                node.tokens.append(token)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above; the answers of a run share most of their states
    def allowed(self, grammar: AnswerGrammar, states: States) -> np.ndarray:
        """Return the ids of the tokens that the grammar accepts from these states."""
        found: list[int] = [self.eos_id] if grammar.may_end(states) else []
        to_visit = [(self._root, states)]
        while to_visit:
            node, current = to_visit.pop()
            for byte, reached in grammar.following(current).items():
                if child := node.children.get(byte):
                    found += child.tokens
                    to_visit.append((child, reached))
        return np.array(found)


class AnswerConstraint:
    """The state of one answer during generation; implements `model.generate.Constraint`."""

    def __init__(self, grammar: AnswerGrammar, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._states = grammar.start
        self._written = bytearray()
        self._complete = 0  # number of bytes up to the end of the last complete item

    def allowed(self) -> np.ndarray:
        """Return the token ids that may come next."""
        return self._vocabulary.allowed(self._grammar, self._states)

    def take(self, token: int) -> None:
        """Advance by the chosen token."""
        for byte in self._vocabulary.pieces[token] or b"":
            self._states = self._grammar.following(self._states)[byte]
            self._written.append(byte)
            if self._grammar.at_item_end(self._states):
                self._complete = len(self._written)

    @property
    def text(self) -> str:
        """The answer so far, without an incomplete last item."""
        return self._written[: self._complete].decode().strip()
