"""Pretraining examples for the demo's base model: read fictional notes and answer in plain words.

The examples teach the language and nothing of the fine-tuning task. They contain neither a diagnosis with its CIM-10
code nor the prompts and answers of `utils.icd10.prompts`: diagnoses have numbers of an invented thesaurus, answers have
another layout, and the words of the task appear in random order, to be copied.
"""

import random
from collections.abc import Iterator
from typing import Any

from utils.fictional_notes.catalogue import Catalogue, bare
from utils.fictional_notes.notes import FictionalNote, write_notes
from utils.icd10.prompts import ANSWER, NOTHING, SYSTEM_PROMPT, USER_PROMPT

_SYSTEMS = (
    "Vous êtes un assistant médical.",
    "Vous relisez des comptes rendus d'hospitalisation.",
    "Réponds en français.",
)
_SUMMARIZE = (
    "Résumez le séjour : {}",
    "Quels problèmes ce séjour a-t-il traités ? {}",
    "{} Quels sont les diagnostics ?",
    "Liste des problèmes, s'il vous plaît : {}",
)
_NAME = ("Que veulent dire ces termes : {} ?", "Donnez le nom complet : {}", "Termes du thésaurus pour : {}")
_COPY = ("Répétez : {}", "{}, à recopier.")
_WORDS = " ".join((SYSTEM_PROMPT, USER_PROMPT, ANSWER, NOTHING)).replace("{", " ").replace("}", " ").split()
_LETTERS, _DIGITS = "ABCDEFGHIJKLMNRSZ", "0123456789"

_TERMS_PHASE = 0.25  # fraction of the examples at the start that are terms without a note
_TERMS = 0.1  # fraction of terms after that
_COPIES = 0.04  # fraction of words to copy
_SHUFFLED_SYSTEMS = 0.3  # fraction with a long system prompt of shuffled words
_MAX_TERMS = 5  # per example


class PretrainingExamples:
    """Generates instruct rows, always the same for a seed.

    Args:
        catalogue: diagnoses to teach; the common ones only.
        seed: 0 or more. The notes have a negative seed, so that they differ from the notes of every other command.
    """

    def __init__(self, catalogue: Catalogue, seed: int) -> None:
        self._rng = random.Random(f"lessons {seed}")  # another string would change all examples
        self._catalogue = Catalogue(catalogue.common)
        self._conditions = list(catalogue.common.values())
        self._numbers = self._invent_numbers()
        self._notes_seed = -1 - seed

    def rows(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield instruct rows: first terms, one, two... at a time, then notes."""
        notes = write_notes(count, self._notes_seed, self._catalogue, "short", "train")
        first = round(_TERMS_PHASE * count)
        for index in range(count):
            if self._rng.random() < _COPIES:
                yield self._copy()
            elif index < first:
                # The number of terms reaches its maximum after 3/5 of this phase.
                yield self._terms(min(_MAX_TERMS, 1 + round(_MAX_TERMS * index / (0.6 * first))))
            elif self._rng.random() < _TERMS:
                yield self._terms(_MAX_TERMS)
            else:
                yield self._note(next(notes))

    def _invent_numbers(self) -> dict[str, str]:
        """Return a unique number for each code, as long as the code and different from every code."""
        codes = {condition.code for condition in self._conditions}
        numbers: dict[str, str] = {}
        for code in sorted(codes):
            while (number := self._number(len(code))) in codes or number in numbers.values():
                pass
            numbers[code] = number
        return numbers

    def _number(self, length: int) -> str:
        return self._rng.choice(_LETTERS) + "".join(self._rng.choices(_DIGITS, k=length - 1))

    def _copy(self) -> dict[str, Any]:
        words = [
            self._rng.choice(_WORDS)
            if self._rng.random() < 0.75
            else f"({self._number(self._rng.randint(3, 5))})" + self._rng.choice(("", ","))
            for _ in range(self._rng.randint(6, 16))
        ]
        text = " ".join(words)
        return self._row(_COPY, text, text)

    def _terms(self, max_terms: int) -> dict[str, Any]:
        chosen = self._rng.sample(self._conditions, min(self._rng.randint(1, max_terms), len(self._conditions)))
        terms = [
            bare(self._rng.choice(_without_figures(condition.written) or (condition.label,))) for condition in chosen
        ]
        answer = " ; ".join(self._item(condition.code, condition.label) for condition in chosen)
        return self._row(_NAME, ", ".join(terms), f"{answer}.")

    def _note(self, note: FictionalNote) -> dict[str, Any]:
        treated, followed, others = (self._items(note, role) for role in ("DP", "DR", "DAS"))
        answer = f"Problème traité : {treated}. Maladie suivie : {followed}. Autres problèmes : {others}."
        return self._row(_SUMMARIZE, note.text, answer)

    def _items(self, note: FictionalNote, role: str) -> str:
        items = (self._item(item.code, item.label) for item in note.diagnoses if item.role == role)
        return " ; ".join(items) or "néant"

    def _item(self, code: str, label: str) -> str:
        return f"{label} ({self._numbers[code]})"

    def _row(self, questions: tuple[str, ...], text: str, answer: str) -> dict[str, Any]:
        system = self._rng.choice(_SYSTEMS)
        if self._rng.random() < _SHUFFLED_SYSTEMS:
            system = " ".join(self._rng.choices(_WORDS, k=self._rng.randint(5, 70)))
        contents = {"system": system, "user": self._rng.choice(questions).format(text), "assistant": answer}
        return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def _without_figures(wordings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the wordings without measurements of a note."""
    return tuple(wording for wording in wordings if "{" not in wording)
