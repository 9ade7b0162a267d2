"""The restriction to a table's codes by engines that decode with a grammar, and the check of what they answer."""

from collections.abc import Callable
from typing import Any

from utils.engines.engine import Reply
from utils.icd10.answer_grammar import OPTIONAL_SPACE, Grammar, answer_grammar, as_gbnf, as_lark
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerGrammar
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError

# Fields of a request by the kind of server, which is the owner of the models that it lists.
_REQUEST_FIELDS: dict[str, Callable[[Grammar], dict[str, Any]]] = {
    "vllm": lambda grammar: {"structured_outputs": {"grammar": as_lark(grammar)}},
    "llamacpp": lambda grammar: {"grammar": as_gbnf(grammar)},
}
_NOT_ALLOWED = "the answer is not restricted to the codes of --cim10: the engine did not follow the grammar"


class TableGrammar:
    """The grammar of answers with codes of a table.

    Args:
        table: allowed codes.
        rules: coding rules; None for those of the guide.
    """

    def __init__(self, table: Cim10Table, rules: RuleSet | None = None) -> None:
        self._grammar = answer_grammar(table, OPTIONAL_SPACE, rules)
        self._automaton = AnswerGrammar(table, rules=rules)

    def lark(self) -> str:
        """Return it in llguidance's format."""
        return as_lark(self._grammar)

    def request_fields(self, owner: str | None) -> dict[str, Any] | None:
        """Return what a request to a server has in addition to OpenAI's fields, or None if that is not known.

        Args:
            owner: of the models that the server lists.
        """
        fields = _REQUEST_FIELDS.get(owner or "")
        return fields and fields(self._grammar)

    def check(self, reply: Reply) -> Reply | SkippedRowError:
        """Return the reply without an incomplete last code and codes that rules exclude, or why it is refused."""
        text = self._automaton.accepted(reply.text, reply.is_complete)
        return SkippedRowError(_NOT_ALLOWED) if text is None else reply._replace(text=text)
