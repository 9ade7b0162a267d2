"""Turns templates into French sentences about one stay, and remembers what has been told."""

import random
import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta

from utils.fictional_notes import phrases
from utils.fictional_notes.catalogue import Condition, wording_forms
from utils.fictional_notes.scenarios import Stay

Wordings = Callable[[Condition], Sequence[str]]
# How a diagnosis may be worded: `all` draws from both lists.
WORDINGS: dict[str, Wordings] = {
    "train": lambda condition: condition.written,
    "unseen": lambda condition: condition.unseen,
    "all": lambda condition: (*condition.written, *condition.unseen),
}

_SLOT = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")


class NoteWriter:
    """Speaks about one stay. `told` lists the codes named so far, in order."""

    def __init__(self, rng: random.Random, stay: Stay, wordings: Wordings) -> None:
        self.rng = rng
        self.stay = stay
        self.told: list[str] = []
        self._wordings = wordings
        # `managed` and `drugs` are parallel lists: one number keeps "sous ramipril" and its prescription together.
        self._treatments = {condition.code: rng.randrange(12) for condition in stay.conditions}
        self._context = _people(rng, stay) | _dates(rng, stay) | _measures(rng, stay)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def say(self, templates: Sequence[str], **slots: str) -> str:
        """One of the templates, filled in, as a sentence or list item."""
        return self.render(self.rng.choice(templates), **slots)

    def name(self, condition: Condition, templates: Sequence[str], **slots: str) -> str:
        """A sentence that states a coded diagnosis."""
        if condition.code not in self.told:
            self.told.append(condition.code)
        return self.say_of(self.rng.choice(self._wordings(condition)), templates, **slots)

    def exclude(self, condition: Condition, templates: Sequence[str], **slots: str) -> str:
        """A sentence on a diagnosis that is not coded, in its plainest wording and without figures."""
        return self.say_of(self._wordings(condition)[0], templates, **slots)

    def treatment(self, condition: Condition, lines: Sequence[str]) -> str:
        """The line of `managed` or `drugs` that fits this patient, the same each time but for its numbers."""
        return self.render(lines[self._treatments[condition.code] % len(lines)]) if lines else ""

    def say_of(self, wording: str, templates: Sequence[str], **slots: str) -> str:
        """A sentence on something worded as "une HTA"; a wording without article only where none is needed."""
        forms = wording_forms(self.render(wording))
        if forms["un"] == forms["nu"]:
            templates = [template for template in templates if "{un}" not in template]
        return self.say(templates, **forms, **slots)

    def render(self, template: str, **slots: str) -> str:
        """Fills braces, innermost first: a slot (capitalised if its name is), {2-5} a number, {a|b} a choice."""
        context = self._context | slots

        def fill(match: re.Match[str]) -> str:
            slot = match[1]
            if slot in context:
                return context[slot]
            if slot.lower() in context:
                return capitalise(context[slot.lower()])
            if span := _RANGE.fullmatch(slot):
                return str(self.rng.randint(int(span[1]), int(span[2]))).zfill(len(span[1]))
            if "|" in slot:
                return self.rng.choice(slot.split("|"))
            raise KeyError(f"nothing fills {{{slot}}} in {template!r}")

        while _SLOT.search(template):
            template = _SLOT.sub(fill, template)
        return template


def capitalise(text: str) -> str:
    """First letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def _people(rng: random.Random, stay: Stay) -> dict[str, str]:
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


def _dates(rng: random.Random, stay: Stay) -> dict[str, str]:
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


def _measures(rng: random.Random, stay: Stay) -> dict[str, str]:
    spans = {name: (measure.low, measure.high) for name, measure in phrases.MEASURES.items()}
    for condition in reversed(stay.conditions):  # the main diagnosis has the last word
        # What happens later is not seen in the vital signs of the first day.
        late = condition.kind == "event" and condition not in stay.reasons
        spans |= {
            name: (low, high) for name, low, high in condition.measures if not (late and phrases.MEASURES[name].vital)
        }
    return {name: _figure(rng.uniform(*span), phrases.MEASURES[name].decimals) for name, span in spans.items()}


def _figure(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace(".", ",")
