"""The strings that an answer can be, given a CIM-10 table: one description for our decoding and for other engines.

Answers are those of `build_answer`: one DP, at most one DR, any number of DAS, each "label (code)" from the table and
allowed in its role.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from utils.icd10.codes import ROLES, Cim10Table
from utils.icd10.prompts import ANSWER, CODE_ITEM, ITEM_SEPARATOR, NOTHING

START, END = "opening", "end"
# Else llguidance chooses the tokens of what the grammar determines, and a model can continue otherwise than here.
_ALL_TOKENIZATIONS = '%llguidance {"no_forcing": true}'


class Node(NamedTuple):
    """A position in an answer: one of `texts` follows, then one of the nodes `following`; END ends the answer."""

    texts: Sequence[str]
    following: tuple[str, ...]


Grammar = Mapping[str, Node]


# A SentencePiece model's first token has a space, which is not part of the text that an engine returns.
OPTIONAL_SPACE = ("", " ")


def answer_grammar(table: Cim10Table, prefixes: Sequence[str] = ("",)) -> Grammar:
    """Return the grammar of answers with codes of `table`; it starts at START.

    Args:
        table: allowed codes.
        prefixes: what an answer can start with; OPTIONAL_SPACE for engines whose tokenizer is not known.
    """
    items = {
        role: [
            CODE_ITEM.format(label=entry.label, code=entry.code) for entry in table if table.allows(role, entry.code)
        ]
        for role in ROLES
    }
    opening, before_related, before_associated, _ = _fixed_parts()
    return {
        START: Node([prefix + opening for prefix in prefixes], ("dp",)),
        "dp": Node(items["DP"], ("before_dr",)),
        "before_dr": Node([before_related], ("dr",)),
        "dr": Node([NOTHING, *items["DR"]], ("before_das",)),
        "before_das": Node([before_associated], ("das", "no_das")),
        "das": Node(items["DAS"], ("separator", END)),
        "no_das": Node([NOTHING], (END,)),
        "separator": Node([ITEM_SEPARATOR], ("das",)),
    }


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
