"""What the demo's base model learns before it is fine-tuned: to read fictional notes and to answer in plain words.

It is to know the language and nothing of the task. No diagnosis stands beside its CIM-10 code in a lesson, and neither
the prompts nor the sentence of the answers (`utils.icd10.prompts`) do: diagnoses carry the numbers of an invented
thesaurus, answers have another layout, and the words of the task come in a random order, to be copied.
"""

import random
from collections.abc import Iterator
from typing import Any

from utils.fictional_notes.catalogue import Catalogue, bare
from utils.fictional_notes.notes import FictionalNote, write_notes
from utils.icd10.answers import Diagnosis
from utils.icd10.prompts import ANSWER, NOTHING, SYSTEM_PROMPT, USER_PROMPT

_SYSTEMS = (
    "Vous êtes un assistant médical.",
    "Vous relisez des comptes rendus d'hospitalisation.",
    "Réponds en français.",
)
_SUMMARISE = (
    "Résumez le séjour : {}",
    "Quels problèmes ce séjour a-t-il traités ? {}",
    "{} Quels sont les diagnostics ?",
    "Liste des problèmes, s'il vous plaît : {}",
)
_NAME = ("Que veulent dire ces termes : {} ?", "Donnez le nom complet : {}", "Termes du thésaurus pour : {}")
_COPY = ("Répétez : {}", "{}, à recopier.")
_WORDS = " ".join((SYSTEM_PROMPT, USER_PROMPT, ANSWER, NOTHING)).replace("{", " ").replace("}", " ").split()
_LETTERS, _DIGITS = "ABCDEFGHIJKLMNRSZ", "0123456789"

# Shares: of terms without a note at the start, and later on; of words to copy; of lessons behind a long instruction
# of shuffled words.
_TERMS_FIRST, _TERMS, _COPIES, _LONG_INSTRUCTIONS = 0.25, 0.1, 0.04, 0.3
_MOST_TERMS = 5


class PretrainingExamples:
    """Makes lessons, always the same for a seed.

    Args:
        catalogue: diagnoses to teach.
        seed: of all that is drawn, 0 or more; its notes are those of a negative seed, which nobody else asks for.
    """

    def __init__(self, catalogue: Catalogue, seed: int) -> None:
        self._rng = random.Random(f"lessons {seed}")
        self._conditions = list(catalogue.common.values())
        self._numbers = self._invent_numbers()
        self._catalogue, self._notes_seed = catalogue, -1 - seed

    def lessons(self, count: int) -> Iterator[dict[str, Any]]:
        """Yields instruct rows: first terms, one, two, ... at a time, then notes."""
        notes = write_notes(count, self._notes_seed, self._catalogue, "short", "train")
        first = round(_TERMS_FIRST * count)
        for index in range(count):
            if self._rng.random() < _COPIES:
                yield self._copy()
            elif index < first:
                # The number of terms has reached its most after 3/5 of this part.
                yield self._terms(min(_MOST_TERMS, 1 + round(_MOST_TERMS * index / (0.6 * first))))
            elif self._rng.random() < _TERMS:
                yield self._terms(_MOST_TERMS)
            else:
                yield self._note(next(notes))

    def _invent_numbers(self) -> dict[str, str]:
        """A number as long as its code for each diagnosis, which is no code of the catalogue."""
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

    def _terms(self, most: int) -> dict[str, Any]:
        chosen = self._rng.sample(self._conditions, min(self._rng.randint(1, most), len(self._conditions)))
        terms = [bare(self._rng.choice(_plain(condition.written) or (condition.label,))) for condition in chosen]
        answer = " ; ".join(self._item(condition.code, condition.label) for condition in chosen)
        return self._row(_NAME, ", ".join(terms), f"{answer}.")

    def _note(self, note: FictionalNote) -> dict[str, Any]:
        treated, followed, others = (self._items(note, role) for role in ("DP", "DR", "DAS"))
        answer = f"Problème traité : {treated}. Maladie suivie : {followed}. Autres problèmes : {others}."
        return self._row(_SUMMARISE, note.text, answer)

    def _items(self, note: FictionalNote, role: str) -> str:
        items: list[Diagnosis] = [diagnosis for diagnosis in note.diagnoses if diagnosis.role == role]
        return " ; ".join(self._item(diagnosis.code, diagnosis.label) for diagnosis in items) or "néant"

    def _item(self, code: str, label: str) -> str:
        return f"{label} ({self._numbers[code]})"

    def _row(self, questions: tuple[str, ...], text: str, answer: str) -> dict[str, Any]:
        system = self._rng.choice(_SYSTEMS)
        if self._rng.random() < _LONG_INSTRUCTIONS:
            system = " ".join(self._rng.choices(_WORDS, k=self._rng.randint(5, 70)))
        contents = {"system": system, "user": self._rng.choice(questions).format(text), "assistant": answer}
        return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def _plain(wordings: tuple[str, ...]) -> tuple[str, ...]:
    """Those without the figures of a note."""
    return tuple(wording for wording in wordings if "{" not in wording)
