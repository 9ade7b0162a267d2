"""Fill French sentence templates with the facts of one fictional stay."""

import random
import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta

from utils.fictional_notes import phrases
from utils.fictional_notes.catalogue import Condition, wording_forms
from utils.fictional_notes.scenarios import FictionalStay

Wordings = Callable[[Condition], Sequence[str]]
# The wordings that a note may use.
WORDINGS: dict[str, Wordings] = {
    "train": lambda condition: condition.written,
    "unseen": lambda condition: condition.unseen,
    "all": lambda condition: (*condition.written, *condition.unseen),
}

_SLOT = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")


class NoteWriter:
    """Writes the sentences of one note.

    Attributes:
        mentioned: codes of the diagnoses written so far, in order.
        stated: each text that states a coded diagnosis, with its code and the diagnosis' name in it, in lower case.
    """

    def __init__(self, rng: random.Random, stay: FictionalStay, wordings: Wordings) -> None:
        self.rng = rng
        self.stay = stay
        self.mentioned: list[str] = []
        self.stated: list[tuple[str, str, str]] = []
        self._wordings = wordings
        # `managed` and `drugs` are parallel lists: a common index keeps "sous ramipril" and its prescription together.
        self._treatments = {condition.code: rng.randrange(12) for condition in stay.conditions}
        self._facts = _people(rng, stay) | _dates(rng, stay) | _measures(rng, stay)

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.rng.random() < probability

    def write(self, templates: Sequence[str], **slots: str) -> str:
        """Fill one of the templates, chosen at random."""
        return self.fill(self.rng.choice(templates), **slots)

    def write_coded(self, condition: Condition, templates: Sequence[str], **slots: str) -> str:
        """Write a sentence that states a coded diagnosis."""
        if condition.code not in self.mentioned:
            self.mentioned.append(condition.code)
        wording = self.fill(self.rng.choice(self._wordings(condition)))
        text = self.write_wording(wording, templates, **slots)
        self.stated.append((condition.code, text, wording_forms(wording)["nu"].lower()))
        return text

    def write_uncoded(self, condition: Condition, templates: Sequence[str], **slots: str) -> str:
        """Write a sentence on a distractor, in its simplest wording, which contains no measurement."""
        return self.write_wording(self._wordings(condition)[0], templates, **slots)

    def treatment(self, condition: Condition, lines: Sequence[str]) -> str:
        """Return the line of `managed` or `drugs` chosen for this patient, or "" if there are no lines."""
        return self.fill(lines[self._treatments[condition.code] % len(lines)]) if lines else ""

    def write_wording(self, wording: str, templates: Sequence[str], **slots: str) -> str:
        """Write a sentence with a wording such as "une HTA"; one without article skips templates that need it."""
        forms = wording_forms(self.fill(wording))
        if forms["un"] == forms["nu"]:
            templates = [template for template in templates if "{un}" not in template]
        return self.write(templates, **forms, **slots)

    def fill(self, template: str, **slots: str) -> str:
        """Replace braces, innermost first: a slot (capitalized if its name is), {2-5} a number, {a|b} a choice."""
        context = self._facts | slots

        def replace(match: re.Match[str]) -> str:
            slot = match[1]
            if slot in context:
                return context[slot]
            if slot.lower() in context:
                return capitalize(context[slot.lower()])
            if span := _RANGE.fullmatch(slot):
                return str(self.rng.randint(int(span[1]), int(span[2]))).zfill(len(span[1]))
            if "|" in slot:
                return self.rng.choice(slot.split("|"))
            raise KeyError(f"unknown slot {{{slot}}} in {template!r}")

        while _SLOT.search(template):
            template = _SLOT.sub(replace, template)
        return template


def capitalize(text: str) -> str:
    """Return the text with its first letter in upper case; str.capitalize would change the others."""
    return text[:1].upper() + text[1:]


def _people(rng: random.Random, stay: FictionalStay) -> dict[str, str]:
    woman = stay.sex == "F"
    return {
        "pt": "la patiente" if woman else "le patient",
        "un_pt": "une patiente" if woman else "un patient",
        "d_un_pt": "d'une patiente" if woman else "d'un patient",
        "homme": "femme" if woman else "homme",
        "masculin": "féminin" if woman else "masculin",
        "il": "elle" if woman else "il",
        "e": "e" if woman else "",
        "né": "née" if woman else "né",
        "conjoint": "son époux" if woman else "son épouse",
        "civilité": "Mme" if woman else "M.",
        "prénom": rng.choice(phrases.FIRST_NAMES[stay.sex]),
        "initiale": rng.choice("ABCDFGHLMPRTV"),
        "age": str(stay.age),
    }


def _dates(rng: random.Random, stay: FictionalStay) -> dict[str, str]:
    first = date(2024, 1, 1) + timedelta(days=rng.randrange(700))
    last = first + timedelta(days=stay.days)
    return {
        "entrée": first.strftime("%d/%m/%Y"),
        "sortie": last.strftime("%d/%m/%Y"),
        "naissance": str(first.year - stay.age),
        "année_du_séjour": str(first.year),
        "sortie_j": str(stay.days),
        "jour": str(rng.randint(2, max(2, stay.days - 1))),
        "durée": "moins d'un jour" if stay.days == 0 else "1 jour" if stay.days == 1 else f"{stay.days} jours",
    }


def _measures(rng: random.Random, stay: FictionalStay) -> dict[str, str]:
    spans = {name: (measure.low, measure.high) for name, measure in phrases.MEASURES.items()}
    for condition in reversed(stay.conditions):  # the main diagnosis comes last and overrides the others
        # An event during the stay does not change the vital signs at admission.
        late = condition.kind == "event" and condition not in stay.reasons
        spans |= {
            name: (low, high) for name, low, high in condition.measures if not (late and phrases.MEASURES[name].vital)
        }
    return {name: _figure(rng.uniform(*span), phrases.MEASURES[name].decimals) for name, span in spans.items()}


def _figure(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace(".", ",")
