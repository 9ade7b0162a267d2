"""Answers that can only name codes of a table: a grammar over bytes, met by the tokenizer's vocabulary.

The grammar is that of `build_answer`: one DP, at most one DR, any DAS, each "label (code)" of the table and allowed in
its role. It works on bytes, so any tokenization of a label may be generated.
"""

import bisect
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from utils.icd10.codes import ROLES, Cim10Table
from utils.icd10.prompts import ANSWER, CODE_ITEM, ITEM_SEPARATOR, NOTHING

_END = "end"


class _State(NamedTuple):
    """Inside a node: the texts [low, high) of its sorted list agree with the last `depth` bytes."""

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

    def _enter(self, node: str) -> States:
        return frozenset([_State(node, 0, 0 if node == _END else len(self._texts[node]), 0)])

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - lives as long as the grammar, which is one per command
    def step(self, states: States, byte: int) -> States:
        """Where the next byte leads; empty where it may not follow."""
        reached: set[_State] = set()
        for state in states:
            if state.node == _END:
                continue
            texts = self._texts[state.node]
            if state.low == state.high:
                continue
            written = texts[state.low][: state.depth] + bytes([byte])
            low = bisect.bisect_left(texts, written, state.low, state.high)
            high = low
            if low < state.high and texts[low].startswith(written):
                high = (
                    bisect.bisect_left(texts, written[:-1] + bytes([byte + 1]), low, state.high)
                    if byte < 255
                    else state.high
                )
            if low == high:
                continue
            if len(texts[low]) == len(written):  # the shortest stands first: it is complete here
                for following in self._following[state.node]:
                    reached |= self._enter(following)
                low += 1
            if low < high:
                reached.add(_State(state.node, low, high, state.depth + 1))
        return frozenset(reached)

    @staticmethod
    def may_end(states: States) -> bool:
        return any(state.node == _END for state in states)

    @staticmethod
    def at_item_end(states: States) -> bool:
        """Whether an item has just been completed, so that the text could be cut here."""
        ends = {("before DR", 0), ("before DAS", 0), ("separator", 0), (_END, 0)}
        return any((state.node, state.depth) in ends for state in states)


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

    def allowed(self, grammar: AnswerGrammar, states: States) -> list[int]:
        """Tokens whose bytes the grammar accepts from these states on."""
        found: list[int] = [self.eos_id] if grammar.may_end(states) else []
        open_nodes = [(self._root, states)]
        while open_nodes:
            node, at = open_nodes.pop()
            for byte, child in node.items():
                if byte == "tokens" or not (reached := grammar.step(at, byte)):
                    continue
                found += child.get("tokens", ())
                open_nodes.append((child, reached))
        return found


class AnswerConstraint:
    """Follows one answer while it is generated; see `model.generate.Constraint`."""

    def __init__(self, grammar: AnswerGrammar, vocabulary: Vocabulary, cache: dict[States, list[int]]) -> None:
        """`cache` is shared by all answers of a run: many pass through the same states."""
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._cache = cache
        self._states = grammar.start
        self._written = b""
        self._complete = 0  # bytes up to the end of the last whole item

    def allowed(self) -> list[int]:
        """Ids that may come next."""
        if self._states not in self._cache:
            self._cache[self._states] = self._vocabulary.allowed(self._grammar, self._states)
        return self._cache[self._states]

    def take(self, token: int) -> None:
        """Notes the token that was chosen."""
        for byte in self._vocabulary.pieces[token] or b"":
            self._states = self._grammar.step(self._states, byte)
            self._written += bytes([byte])
            if self._grammar.at_item_end(self._states):
                self._complete = len(self._written)

    @property
    def text(self) -> str:
        """The answer so far, without an item that was cut short."""
        return self._written[: self._complete].decode().strip()
