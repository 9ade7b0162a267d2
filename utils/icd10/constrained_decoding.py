"""Constrained decoding: answers that can only contain codes of a table, and that break no forbidding rule.

The grammar is that of `answer_grammar`, over bytes, so that every tokenization of a label can be generated. Rules on
two codes of a stay are enforced in addition: the codes written so far ban others, which may not follow.
"""

import bisect
import functools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils.icd10.answer_grammar import END, ITEM_NODES, START, answer_grammar
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import RuleSet, guide_rules


class _State(NamedTuple):
    """A position in a node: the strings [low, high) of its sorted list start with the last `depth` bytes written."""

    node: str
    low: int
    high: int
    depth: int


States = frozenset[_State]
Item = tuple[str, str]  # role and code


class _Banned(NamedTuple):
    """Strings of a node that may not be written: sorted indices, and how many bytes each shares with an allowed one."""

    indices: Sequence[int]
    shared: Sequence[int]


Bans = Mapping[str, _Banned]  # by node
NO_BANS: Bans = {}


class AnswerGrammar:
    """A nondeterministic automaton over bytes.

    A node is a sorted list of strings, one of which must be written, and the nodes that may come next. In the nodes
    whose strings can be banned no string begins another one: those that do are in a further node.
    """

    def __init__(self, table: Cim10Table, prefix: str = "", rules: RuleSet | None = None) -> None:
        """Build the grammar of answers with codes of `table`.

        Args:
            table: allowed codes.
            prefix: start of every answer (SentencePiece starts a string with a space).
            rules: coding rules, of which those without an end count; None for those of the guide.
        """
        self._table = table
        self._rules = (rules or guide_rules()).in_year(None)
        self._strings: dict[str, list[bytes]] = {}
        self._next_nodes: dict[str, tuple[str, ...]] = {}
        self._nodes: dict[str, list[str]] = {END: [END]}  # of this automaton, by node of the grammar
        self._roles: dict[str, str] = {}
        grammar = answer_grammar(table, [prefix], self._rules)
        for name, node in grammar.items():
            parts = _without_beginnings(sorted({text.encode() for text in node.texts}))
            self._nodes[name] = [f"{name} {number}" if number else name for number in range(len(parts))]
            for part, strings in zip(self._nodes[name], parts):
                self._strings[part] = strings
                self._next_nodes[part] = node.following
                if name in ITEM_NODES:
                    self._roles[part] = ITEM_NODES[name]
        self._places = {
            node: {_code(string): index for index, string in enumerate(self._strings[node])} for node in self._roles
        }
        self.start = self._enter(START)
        after_items = {name for node in ITEM_NODES if node in grammar for name in grammar[node].following}
        self._item_ends = frozenset().union(*map(self._enter, after_items))

    def _enter(self, name: str) -> States:
        return frozenset(_State(node, 0, len(self._strings.get(node, ())), 0) for node in self._nodes[name])

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - a command builds one grammar and keeps it until it exits
    def following(self, states: States) -> Mapping[int, States]:
        """Return the bytes that may come next, each with the states it leads to, without regard to bans."""
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

    def in_item(self, states: States) -> bool:
        """Return whether bytes of an item have been written."""
        return any(state.depth and state.node in self._roles for state in states)

    def completed(self, states: States, byte: int) -> list[Item]:
        """Return the items that a byte completes."""
        found = []
        for node, low, _, depth in states:
            if node in self._roles and self._strings[node][low][depth:] == bytes([byte]):
                found.append((self._roles[node], _code(self._strings[node][low])))
        return found

    # --- Rules on two codes -------------------------------------------------------------------------------------------

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above
    def _banned_by(self, item: Item) -> Mapping[str, frozenset[int]]:
        """Return the strings that a chosen item bans, by node."""
        found = {}
        for node, role in self._roles.items():
            places = self._places[node]
            codes = self._rules.excluded(*item, role, self._table) if role != "DP" else ()
            if indices := frozenset(places[code] for code in codes if code in places):
                found[node] = indices
        return found

    def bans(self, chosen: Sequence[Item]) -> Bans:
        """Return the strings that the chosen items ban."""
        united: defaultdict[str, set[int]] = defaultdict(set)
        for item in chosen:
            for node, indices in self._banned_by(item).items():
                united[node] |= indices
        banned = {node: self._with_shared(node, sorted(indices)) for node, indices in united.items()}
        das = self._nodes.get("das", ())
        if all(node in banned and len(banned[node].indices) == len(self._strings[node]) for node in das):
            banned["separator"] = _Banned([0], [0])  # nothing is left to follow it
        return banned

    def _with_shared(self, node: str, indices: list[int]) -> _Banned:
        """Add what each string shares with the nearest allowed ones before and after it."""
        before, after = [0] * len(indices), [0] * len(indices)
        for place, index in enumerate(indices):
            shared = self._shared(node, index)
            follows = place > 0 and indices[place - 1] == index - 1
            before[place] = min(shared, before[place - 1]) if follows else shared
        for place in reversed(range(len(indices))):
            shared = self._shared(node, indices[place] + 1)
            precedes = place + 1 < len(indices) and indices[place + 1] == indices[place] + 1
            after[place] = min(shared, after[place + 1]) if precedes else shared
        return _Banned(indices, list(map(max, before, after)))

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above
    def _shared(self, node: str, index: int) -> int:
        """Return how many bytes a string shares with the one before it."""
        strings = self._strings[node]
        if not 0 < index < len(strings):
            return 0
        pair = enumerate(zip(strings[index - 1], strings[index]))
        return next((place for place, (one, other) in pair if one != other), 0)  # neither begins the other

    def step(self, states: States, byte: int, bans: Bans) -> States:
        """Return the states that a byte leads to, none if it may not come next."""
        return self.without_banned(self.following(states).get(byte, frozenset()), bans)

    def without_banned(self, states: States, bans: Bans) -> States:
        """Return the states that an allowed string leads on from."""
        for state in states if bans else ():
            if state.node in bans and _is_banned(state, bans[state.node]):
                return self.without_banned(states - {state}, bans)
        return states

    def may_reach_banned(self, states: States, bans: Bans) -> bool:
        """Return whether a banned string can follow from the states."""
        for state in states if bans else ():
            if state.node not in self._roles or self.banned_beginnings(state, bans):
                return True
        return False

    def banned_beginnings(self, state: _State, bans: Bans) -> Collection[bytes]:
        """Return the shortest bytes that lead on from a state of an item only to banned strings."""
        node, low, high, depth = state
        if node not in bans:
            return ()
        indices, shared = bans[node]
        first = bisect.bisect_left(indices, low)
        if first == len(indices) or indices[first] >= high:
            return ()
        last, strings = bisect.bisect_left(indices, high, first), self._strings[node]
        return {strings[indices[place]][depth : max(shared[place], depth) + 1] for place in range(first, last)}

    def fixed_rest(self, state: _State) -> tuple[bytes, States] | None:
        """Return the rest of the string of a state between items, and the states after it; None for other states."""
        strings = self._strings.get(state.node, ())
        if state.node in self._roles or state.high - state.low != 1 or not strings:
            return None
        reached = frozenset().union(*map(self._enter, self._next_nodes[state.node]))
        return strings[state.low][state.depth :], reached

    def accepted(self, answer: str, is_complete: bool) -> str | None:
        """Return an answer without an incomplete last item, or None if the grammar does not allow it.

        The grammar that other engines have leaves out the rules on two codes: a code that breaks one with a code before
        it is left out.

        Args:
            answer: text by another engine.
            is_complete: whether the model ended it; otherwise the end of an allowed answer may be missing.
        """
        states, written, complete = self.start, answer.encode(), 0
        items: list[Item] = []
        for length, byte in enumerate(written, start=1):
            items += self.completed(states, byte)
            states = self.following(states).get(byte, frozenset())
            if self.at_item_end(states):
                complete = length
        if not (self.may_end(states) if is_complete else states):
            return None
        coding = [Diagnosis(role, code, self._table.label(code) or "") for role, code in items]
        kept, removed = self._rules.repaired(coding, self._table)
        return build_answer(kept) if removed else written[:complete].decode()


def _without_beginnings(strings: list[bytes]) -> list[list[bytes]]:
    """Return sorted strings as lists in which none begins another, most in the first list."""
    following = [*strings[1:], b""]
    kept = [string for string, after in zip(strings, following) if not after.startswith(string)]
    others = [string for string, after in zip(strings, following) if after.startswith(string)]
    return [kept, *(_without_beginnings(others) if others else ())]


def _code(string: bytes) -> str:
    return string[string.rindex(b"(") + 1 : -1].decode()


def _is_banned(state: _State, banned: _Banned) -> bool:
    """Return whether all strings of a state are banned."""
    first, last = (bisect.bisect_left(banned.indices, end) for end in (state.low, state.high))
    return last - first == state.high - state.low


class _TrieNode:
    """A node of the trie of token bytes."""

    __slots__ = ("children", "tokens")

    def __init__(self) -> None:
        self.children: dict[int, _TrieNode] = {}
        self.tokens: list[int] = []  # ids of the tokens that end here

    def descend(self, beginning: bytes) -> "_TrieNode | None":
        """Return the node of the tokens that continue with these bytes."""
        node = self
        for byte in beginning:
            if byte not in node.children:
                return None
            node = node.children[byte]
        return node


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

    def allowed(self, grammar: AnswerGrammar, states: States, bans: Bans = NO_BANS) -> np.ndarray:
        """Return the sorted ids of the tokens that the grammar accepts from these states.

        Without any state, a token has ended the last code that there was, and has begun what would need another: the
        answer ends.
        """
        if not states:
            return np.array([self.eos_id])
        found = self._accepted(grammar, states)
        removed = self._banned(grammar, states, bans) if grammar.may_reach_banned(states, bans) else ()
        if not removed:
            return found
        tokens = np.fromiter(removed, found.dtype, len(removed))
        places = np.searchsorted(found, tokens)
        return np.delete(found, places[found.take(places, mode="clip") == tokens])

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above; the answers of a run share most of their states
    def _accepted(self, grammar: AnswerGrammar, states: States) -> np.ndarray:
        """Return the ids of the tokens that the grammar accepts without regard to bans.

        What an item bans is known when a token ends it, so that no token ends an item and begins another.
        """
        found: list[int] = [self.eos_id] if grammar.may_end(states) else []
        to_visit = [(self._root, states, False)]
        while to_visit:
            node, current, has_ended = to_visit.pop()
            for byte, reached in grammar.following(current).items():
                child = node.children.get(byte)
                if child and not (has_ended and grammar.in_item(reached)):
                    found += child.tokens
                    to_visit.append((child, reached, has_ended or grammar.at_item_end(reached)))
        return np.array(sorted(found), dtype=np.int64)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above
    def _item_positions(self, grammar: AnswerGrammar, states: States) -> tuple[list[tuple[_TrieNode, _State]], bool]:
        """Return where tokens read bytes of an item, and whether each token is read in one way."""
        found, is_unique = [], True
        to_visit = [(self._root, states)]
        while to_visit:
            node, current = to_visit.pop()
            is_unique = is_unique and sum(state.node != END for state in current) < 2
            for state in current:
                rest = grammar.fixed_rest(state)
                if rest is None:
                    found.append((node, state))
                elif end := node.descend(rest[0]):
                    to_visit.append((end, rest[1]))
        return found, is_unique

    def _banned(self, grammar: AnswerGrammar, states: States, bans: Bans) -> set[int]:
        """Return the ids of tokens that lead only to banned strings."""
        found: set[int] = set()
        positions, is_unique = self._item_positions(grammar, states)
        for node, state in positions:
            for beginning in grammar.banned_beginnings(state, bans):
                if end := node.descend(beginning):
                    found.update(self._below(end))
        return found if is_unique else {token for token in found if not self._leads_on(grammar, states, token, bans)}

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above
    def reached(self, grammar: AnswerGrammar, states: States, token: int) -> States | None:
        """Return the states that a token leads to without regard to bans; None if it completes an item on its way."""
        for byte in self.pieces[token] or b"":
            states = grammar.following(states)[byte]
            if grammar.at_item_end(states):
                return None
        return states

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - as above
    def _below(self, node: _TrieNode) -> Sequence[int]:
        """Return the tokens that begin with the bytes of a node of the trie."""
        return [*node.tokens, *(token for child in node.children.values() for token in self._below(child))]

    def _leads_on(self, grammar: AnswerGrammar, states: States, token: int, bans: Bans) -> bool:
        for byte in self.pieces[token] or b"":
            states = grammar.step(states, byte, bans)
        return bool(states)


class AnswerConstraint:
    """The state of one answer during generation; implements `model.generate.Constraint`."""

    def __init__(self, grammar: AnswerGrammar, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._states = grammar.start
        self._chosen: list[Item] = []
        self._bans = NO_BANS
        self._written = bytearray()
        self._complete = 0  # number of bytes up to the end of the last complete item

    def allowed(self) -> np.ndarray:
        """Return the token ids that may come next."""
        return self._vocabulary.allowed(self._grammar, self._states, self._bans)

    def take(self, token: int) -> None:
        """Advance by the chosen token."""
        grammar, piece = self._grammar, self._vocabulary.pieces[token] or b""
        reached = self._vocabulary.reached(grammar, self._states, token) if piece and self._states else self._states
        if reached is not None:
            self._states = grammar.without_banned(reached, self._bans)
            self._written += piece
            return
        for byte in piece:
            before, self._states = self._states, grammar.step(self._states, byte, self._bans)
            self._written.append(byte)
            if grammar.at_item_end(self._states):
                self._complete = len(self._written)
                if completed := grammar.completed(before, byte):
                    self._chosen += completed
                    self._bans = grammar.bans(self._chosen)
                    self._states = grammar.without_banned(self._states, self._bans)

    @property
    def text(self) -> str:
        """The answer so far, without an incomplete last item."""
        return self._written[: self._complete].decode().strip()
