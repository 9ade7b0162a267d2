"""Answers that can only name codes of a table: a grammar over bytes, met by the tokenizer's vocabulary.

The grammar is that of `build_answer`: one DP, at most one DR, any DAS, each "label (code)" of the table and allowed in
its role. It works on bytes, so any tokenization of a label may be generated.
"""

import bisect
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils.icd10.codes import ROLES, Cim10Table
from utils.icd10.prompts import ANSWER, CODE_ITEM, ITEM_SEPARATOR, NOTHING

_END = "end"


class _State(NamedTuple):
    """Inside a node: the texts [low, high) of its sorted list begin with the last `depth` bytes, and go on."""

    node: str
    low: int
    high: int
    depth: int


States = frozenset[_State]


class AnswerGrammar:
    """Which bytes may follow which.

    A node is a sorted list of texts, one of which must be written, and the nodes that may follow.
    """

    def __init__(self, table: Cim10Table, prefix: str = "") -> None:
        """Takes the codes of `table`; every answer begins with `prefix` (SentencePiece begins with a blank)."""
        items = {
            role: [
                CODE_ITEM.format(label=entry.label, code=entry.code)
                for entry in table
                if table.allows(role, entry.code)
            ]
            for role in ROLES
        }
        opening, before_related, before_associated, _ = _fixed_parts()
        nodes: dict[str, tuple[Iterable[str], tuple[str, ...]]] = {
            "opening": ([prefix + opening], ("DP",)),
            "DP": (items["DP"], ("before DR",)),
            "before DR": ([before_related], ("DR",)),
            "DR": ([NOTHING, *items["DR"]], ("before DAS",)),
            "before DAS": ([before_associated], ("DAS", "no DAS")),
            "DAS": (items["DAS"], ("separator", _END)),
            "no DAS": ([NOTHING], (_END,)),
            "separator": ([ITEM_SEPARATOR], ("DAS",)),
        }
        self._texts = {name: sorted({text.encode() for text in texts}) for name, (texts, _) in nodes.items()}
        self._following = {name: following for name, (_, following) in nodes.items()}
        self.start = self._enter("opening")
        self._item_ends = frozenset().union(*map(self._enter, ("before DR", "before DAS", "separator", _END)))

    def _enter(self, node: str) -> States:
        return frozenset([_State(node, 0, len(self._texts.get(node, ())), 0)])

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - lives as long as the grammar, which is one per command
    def following(self, states: States) -> Mapping[int, States]:
        """The bytes that may come next, and where each leads."""
        reached: defaultdict[int, set[_State]] = defaultdict(set)
        for node, low, high, depth in states:
            texts = self._texts.get(node, ())
            while low < high:
                byte = texts[low][depth]
                end = bisect.bisect_right(texts, byte, low, high, key=lambda text: text[depth])
                if len(texts[low]) == depth + 1:  # the shortest stands first: it is complete here
                    reached[byte].update(*(self._enter(entered) for entered in self._following[node]))
                    low += 1
                if low < end:
                    reached[byte].add(_State(node, low, end, depth + 1))
                low = end
        return {byte: frozenset(found) for byte, found in reached.items()}

    @staticmethod
    def may_end(states: States) -> bool:
        return any(state.node == _END for state in states)

    def at_item_end(self, states: States) -> bool:
        """Whether an item has just been completed, so that the text could be cut here."""
        return not self._item_ends.isdisjoint(states)


def _fixed_parts() -> Sequence[str]:
    """What stands before the DP, the DR, the DAS, and at the end."""
    mark = "\0"
    return ANSWER.format(DP=mark, DR=mark, DAS=mark).split(mark)


class Vocabulary:
    """The tokens of a tokenizer as a tree of bytes."""

    def __init__(self, pieces: Sequence[bytes | None], eos_id: int) -> None:
        """Takes each token's bytes; None for tokens that write no text, such as control tokens."""
        self.pieces = pieces
        self.eos_id = eos_id
        self._root: dict = {}
        for token, piece in enumerate(pieces):
            if piece:
                node = self._root
                for byte in piece:
                    node = node.setdefault(byte, {})
                node.setdefault("tokens", []).append(token)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above; the answers of a run pass through the same states
    def allowed(self, grammar: AnswerGrammar, states: States) -> np.ndarray:
        """Ids of the tokens whose bytes the grammar accepts from these states on."""
        found: list[int] = [self.eos_id] if grammar.may_end(states) else []
        open_nodes = [(self._root, states)]
        while open_nodes:
            node, at = open_nodes.pop()
            for byte, reached in grammar.following(at).items():
                if child := node.get(byte):
                    found += child.get("tokens", ())
                    open_nodes.append((child, reached))
        return np.array(found)


class AnswerConstraint:
    """Follows one answer while it is generated; see `model.generate.Constraint`."""

    def __init__(self, grammar: AnswerGrammar, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._states = grammar.start
        self._written = bytearray()
        self._complete = 0  # bytes up to the end of the last whole item

    def allowed(self) -> np.ndarray:
        """Ids that may come next."""
        return self._vocabulary.allowed(self._grammar, self._states)

    def take(self, token: int) -> None:
        """Notes the token that was chosen."""
        for byte in self._vocabulary.pieces[token] or b"":
            self._states = self._grammar.following(self._states)[byte]
            self._written.append(byte)
            if self._grammar.at_item_end(self._states):
                self._complete = len(self._written)

    @property
    def text(self) -> str:
        """The answer so far, without an item that was cut short."""
        return self._written[: self._complete].decode().strip()
