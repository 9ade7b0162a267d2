"""The strings that an answer can be, given a CIM-10 table: one description for our decoding and for other engines.

Answers are those of `build_answer`: one DP, at most one DR, any number of DAS, each "label (code)" from the table and
allowed in its role. Whether there is a DR follows from the DP, where forbidding rules say so. Rules on two codes of a
stay are not part of this description, which would be as large as the square of the table: `constrained_decoding`
enforces them, and answers of other engines are repaired.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from utils.icd10.codes import ROLES, Cim10Entry, Cim10Table
from utils.icd10.prompts import ANSWER, CODE_ITEM, ITEM_SEPARATOR, NOTHING
from utils.icd10.rules import RuleSet, guide_rules

START, END = "opening", "end"
# Else llguidance chooses the tokens of what the grammar determines, and a model can continue otherwise than here.
_ALL_TOKENIZATIONS = '%llguidance {"no_forcing": true}'


class Node(NamedTuple):
    """A position in an answer: one of `texts` follows, then one of the nodes `following`; END ends the answer."""

    texts: Sequence[str]
    following: tuple[str, ...]


Grammar = Mapping[str, Node]

# What can follow a DP, by the node of the DP.
_DR_AFTER = {"dp": ("dr", "no_dr"), "dp_without_dr": ("no_dr",), "dp_with_dr": ("dr",)}
# Nodes of codes, and the role of each.
ITEM_NODES = {**dict.fromkeys(_DR_AFTER, "DP"), "dr": "DR", "das": "DAS"}

# A SentencePiece model's first token has a space, which is not part of the text that an engine returns.
OPTIONAL_SPACE = ("", " ")


def answer_grammar(table: Cim10Table, prefixes: Sequence[str] = ("",), rules: RuleSet | None = None) -> Grammar:
    """Return the grammar of answers with codes of `table`; it starts at START.

    Args:
        table: allowed codes.
        prefixes: what an answer can start with; OPTIONAL_SPACE for engines whose tokenizer is not known.
        rules: coding rules, of which those without an end count; None for those of the guide.
    """
    rules = (rules or guide_rules()).in_year(None)
    entries = {role: [entry for entry in table if rules.allows(role, entry)] for role in ROLES}
    mains: dict[str, list[Cim10Entry]] = {name: [] for name in _DR_AFTER}
    for entry in entries["DP"]:
        mains[_dp_node(entry.code, entries["DR"], table, rules)].append(entry)
    opening, before_related, before_associated, _ = _fixed_parts()
    nodes = {
        START: Node([prefix + opening for prefix in prefixes], tuple(_DR_AFTER)),
        **{name: Node(_texts(found), (f"before_dr_of_{name}",)) for name, found in mains.items()},
        **{f"before_dr_of_{name}": Node([before_related], following) for name, following in _DR_AFTER.items()},
        "dr": Node(_texts(entries["DR"]), ("before_das",)),
        "no_dr": Node([NOTHING], ("before_das",)),
        "before_das": Node([before_associated], ("das", "no_das")),
        "das": Node(_texts(entries["DAS"]), ("separator", END)),
        "no_das": Node([NOTHING], (END,)),
        "separator": Node([ITEM_SEPARATOR], ("das",)),
    }
    return _without_unused(nodes)


def item_texts(grammar: Grammar) -> dict[str, list[str]]:
    """Return the texts of codes in each role."""
    nodes = {role: [name for name in grammar if ITEM_NODES.get(name) == role] for role in ROLES}
    return {role: [text for name in names for text in grammar[name].texts] for role, names in nodes.items()}


def _dp_node(dp: str, related: Sequence[Cim10Entry], table: Cim10Table, rules: RuleSet) -> str:
    """Return the node of a DP: its stays may, cannot or must have one of the related diagnoses."""
    if not related or not rules.may_have_dr(dp):
        return "dp_without_dr"
    # A rule that wants a DR does not count where others exclude every DR.
    required = rules.must_have_dr(dp) and any(
        entry.code not in rules.excluded("DP", dp, "DR", table) for entry in related
    )
    return "dp_with_dr" if required else "dp"


def _texts(entries: Sequence[Cim10Entry]) -> Sequence[str]:
    return [CODE_ITEM.format(label=entry.label, code=entry.code) for entry in entries]


def _without_unused(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Return the nodes that have texts and can be reached."""
    filled = {name for name, node in nodes.items() if node.texts} | {END}
    kept: dict[str, Node] = {}
    to_visit = [START]
    while to_visit:
        name = to_visit.pop(0)
        if name not in kept and name != END:
            node = nodes[name]
            kept[name] = node._replace(following=tuple(other for other in node.following if other in filled))
            to_visit += kept[name].following
    return kept


def _fixed_parts() -> Sequence[str]:
    """Return the parts of the answer before the DP, before the DR, before the DAS, and after them."""
    mark = "\0"
    return ANSWER.format(DP=mark, DR=mark, DAS=mark).split(mark)


def as_lark(grammar: Grammar) -> str:
    """Return the grammar in llguidance's variant of Lark, which vLLM and SGLang pass on to it."""
    lines = [_ALL_TOKENIZATIONS, f"start: {START}"]
    for name, node in grammar.items():
        following = [other for other in node.following if other != END]
        rest = f" ({' | '.join(following)}){'?' * (END in node.following)}" if following else ""
        lines += [f"{name}: {name.upper()}{rest}", f"{name.upper()}: {_alternatives(node.texts)}"]
    return "\n".join(lines) + "\n"


def as_gbnf(grammar: Grammar) -> str:
    """Return the grammar in llama.cpp's format, which is also xgrammar's."""
    lines = [f"root ::= {START}"]
    for name, node in grammar.items():
        rest = " | ".join('""' if other == END else _gbnf_name(other) for other in node.following)
        lines.append(f"{_gbnf_name(name)} ::= ({_alternatives(node.texts)}) ({rest})")
    return "\n".join(lines) + "\n"


def _gbnf_name(name: str) -> str:
    return name.replace("_", "-")  # llama.cpp's names have no underscore


def _alternatives(texts: Sequence[str]) -> str:
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
