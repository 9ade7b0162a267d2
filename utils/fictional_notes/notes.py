"""Fictional discharge notes with their codes: offline, seeded, for demos and tests, never for evaluation of care.

The coded diagnoses are told under their many names, beside findings ruled out, resolved episodes and relatives'
diseases that must not be coded, so that no single sentence gives the answer.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from utils.fictional_notes import phrases
from utils.fictional_notes.catalogue import Catalogue, Condition
from utils.fictional_notes.distractors import Distractors, choose_traps
from utils.fictional_notes.note_writer import WORDINGS, NoteWriter, capitalise
from utils.fictional_notes.scenarios import MAX_DAS, Stay, sample_stay
from utils.icd10.answers import Diagnosis

LENGTHS = ("short", "long")
# A note of about 100 tokens has room for this many associated diagnoses.
_SHORT_MAX_DAS = 4


@dataclass(frozen=True)
class FictionalNote:
    """A note and what a medical-information team would code; DAS stand in the order the note tells them."""

    id: str
    text: str
    diagnoses: tuple[Diagnosis, ...]


def write_notes(
    count: int, seed: int, catalogue: Catalogue, length: str = "long", wordings: str = "all"
) -> Iterator[FictionalNote]:
    """Writes notes; the first ones do not depend on `count`, stays not on `wordings`.

    Args:
        count: number of notes.
        seed: same seed, same notes.
        catalogue: diagnoses to draw from.
        length: "short" (about 100 tokens) or "long" (some 600 to 1500).
        wordings: "train", "unseen" (names that "train" never uses) or "all".
    """
    for index in range(count):
        rng, stay = seeded_stay(index, seed, catalogue, length)
        narrator = NoteWriter(rng, stay, WORDINGS[wordings])
        compose = _short_note if length == "short" else _long_note
        text = compose(narrator, choose_traps(rng, stay, catalogue, length))
        name = hashlib.sha1(f"{seed} {length} {wordings} {index}".encode(), usedforsecurity=False).hexdigest()
        yield FictionalNote(name, text, _in_order_told(stay, narrator.told))


def seeded_stay(index: int, seed: int, catalogue: Catalogue, length: str) -> tuple[random.Random, Stay]:
    """The stay of the note `index`, whoever writes it, and the source of chance to go on with."""
    rng = random.Random(f"{seed} {length} {index}")
    return rng, sample_stay(rng, catalogue, _SHORT_MAX_DAS if length == "short" else MAX_DAS)


def _in_order_told(stay: Stay, told: list[str]) -> tuple[Diagnosis, ...]:
    diagnoses = stay.diagnoses()
    reasons = len(stay.reasons)
    return (*diagnoses[:reasons], *sorted(diagnoses[reasons:], key=lambda diagnosis: told.index(diagnosis.code)))


# --- Sentences of both lengths ----------------------------------------------------------------------------------------


def _past(narrator: NoteWriter, condition: Condition) -> str:
    # Not before the age at which one gets it, nor so late that it could still be active.
    years = narrator.rng.randint(3, max(3, min(25, narrator.stay.age - condition.age[0])))
    return narrator.exclude(condition, phrases.PAST, année=_years_ago(narrator, years), ancienneté=str(years))


def _years_ago(narrator: NoteWriter, years: int) -> str:
    return str(int(narrator.render("{année_du_séjour}")) - years)


def _family(narrator: NoteWriter, condition: Condition) -> str:
    sex = narrator.rng.choice(condition.sex)
    relative = narrator.rng.choice(phrases.RELATIVES[sex])
    slots = {"parent": relative, "son_parent": ("sa " if sex == "F" else "son ") + relative}
    return narrator.exclude(condition, phrases.FAMILY, e_parent="e" if sex == "F" else "", **slots)


def _associated(narrator: NoteWriter, condition: Condition) -> str:
    """States an associated diagnosis outside the antecedents."""
    templates = {
        "chronic": phrases.BY_THE_WAY,
        "bio": phrases.IN_BLOOD,
        "imaging": phrases.ON_IMAGES,
        "event": phrases.DURING_STAY,
    }[condition.kind]
    if narrator.stay.days < 3:
        templates = [template for template in templates if "{jour}" not in template]
    return narrator.name(condition, templates, suite=_managed(narrator, condition, ", "))


def _managed(narrator: NoteWriter, condition: Condition, separator: str = " ") -> str:
    managed = narrator.treatment(condition, condition.managed)
    return separator + managed if managed and narrator.chance(0.5) else ""


def _antecedent(narrator: NoteWriter, condition: Condition) -> str:
    return narrator.name(condition, ("{nu}",)) + _managed(narrator, condition)


def _shuffled(
    narrator: NoteWriter, told_by: dict[Callable[[NoteWriter, Condition], str], list[Condition]]
) -> list[str]:
    """Tells diagnoses in a random order, each by the function it stands under."""
    pairs = [(tell, item) for tell, items in told_by.items() for item in items]
    narrator.rng.shuffle(pairs)
    return [tell(narrator, item) for tell, item in pairs]


def _split_das(narrator: NoteWriter) -> tuple[list[Condition], list[Condition]]:
    """Associated diagnoses told among the antecedents, and those told later."""
    early = [item for item in narrator.stay.das if item.kind == "chronic" and narrator.chance(0.8)]
    return early, [item for item in narrator.stay.das if item not in early]


def _discharge(narrator: NoteWriter) -> str:
    stay = narrator.stay
    if stay.days == 0:
        return narrator.say(phrases.DISCHARGES["same day"])
    return narrator.say(phrases.DISCHARGES["frail" if stay.age >= 80 and stay.days >= 5 else "home"])


def _motive(narrator: NoteWriter, templates: tuple[str, ...]) -> tuple[str, bool]:
    """The first sentence, and whether it gave the main diagnosis away instead of a complaint."""
    main = narrator.stay.dp
    if main.complaints and narrator.chance(0.5):
        return narrator.say_of(narrator.rng.choice(main.complaints), templates), False
    return narrator.name(main, templates), True


# --- Short notes ------------------------------------------------------------------------------------------------------


def _short_note(narrator: NoteWriter, traps: Distractors) -> str:
    rng, stay = narrator.rng, narrator.stay
    motive, told = _motive(narrator, phrases.SHORT_MOTIVES)
    early, late = _split_das(narrator)
    items = _shuffled(narrator, {_antecedent: early, _past: traps.past, _family: traps.family})
    sentences = [motive]
    if items:
        sentences.append(narrator.say(phrases.ANTECEDENTS, liste=", ".join(items)))
    findings = (*stay.dp.history, *stay.dp.exam, *stay.dp.tests)
    if findings and narrator.chance(0.6):
        sentences.append(narrator.say(findings))
    body = [] if told else [narrator.name(stay.dp, phrases.CONCLUSIONS)]
    body += [narrator.name(stay.dr, phrases.RELATED)] if stay.dr else []
    body += [narrator.exclude(item, phrases.ABSENT) for item in traps.absent]
    rng.shuffle(body)
    sentences += body + [_associated(narrator, item) for item in late]
    return " ".join([*sentences, _discharge(narrator)])


# --- Long notes -------------------------------------------------------------------------------------------------------


def _long_note(narrator: NoteWriter, traps: Distractors) -> str:
    motive, told = _motive(narrator, phrases.MOTIVES)
    early, late = _split_das(narrator)
    on_images = [item for item in late if item.kind in ("imaging", "bio") and narrator.chance(0.7)]
    during = [item for item in late if item not in on_images]
    ruled_out = [narrator.exclude(item, phrases.ABSENT) for item in traps.absent if item.kind != "chronic"]
    sections = {"motif": [narrator.say(phrases.ADMISSIONS[narrator.stay.dp.scheduled]), motive]}
    sections["antécédents"] = _antecedents(narrator, early, traps)
    sections["entrée"] = _drugs(narrator, early)
    sections["vie"] = [narrator.say(phrases.LIVES["active" if narrator.stay.age < 62 else "retired"])]
    sections["histoire"] = _history(narrator)
    sections["examen"] = _examination(narrator)
    sections["examens"] = [*_tests(narrator, on_images), *ruled_out]
    sections["évolution"] = _course(narrator, told, during)
    sections["conclusion"] = _conclusion(narrator)
    sections["sortie"] = _drugs(narrator, [*narrator.stay.reasons, *narrator.stay.das], filler=True)
    sections["suivi"] = [_discharge(narrator), narrator.say(phrases.FOLLOW_UPS)]
    if narrator.chance(0.4):
        del sections["vie"]
    style = narrator.rng.choice(phrases.HEADING_STYLES)
    parts = [_heading(narrator, key, lines, style) for key, lines in sections.items() if lines]
    return "\n\n".join([_header(narrator), *parts, narrator.say(phrases.SIGNATURES)])


def _header(narrator: NoteWriter) -> str:
    lines = [
        narrator.say(phrases.TITLES),
        f"{narrator.say(phrases.PLACES)} - Service : {narrator.stay.dp.service}",
        narrator.say(phrases.IDENTITIES),
        narrator.say(phrases.DATES),
    ]
    if narrator.chance(0.5):
        lines.append(narrator.say(phrases.LETTER_OPENINGS))
    return "\n".join(lines)


def _heading(narrator: NoteWriter, key: str, lines: list[str], style: str) -> str:
    title = narrator.rng.choice(phrases.HEADINGS[key])
    text = "\n".join(lines) if lines[0].startswith("- ") else " ".join(lines)
    if text.startswith("- "):
        style = style.replace("{titre} : {texte}", "{titre} :\n{texte}")
    return style.format(titre=title, TITRE=title.upper(), texte=text)


def _antecedents(narrator: NoteWriter, early: list[Condition], traps: Distractors) -> list[str]:
    """One list item per line: active diseases, old episodes, operations, relatives, what one never had."""
    items = _shuffled(narrator, {_antecedent: early, _past: traps.past})
    groups = {condition.group for condition in narrator.stay.conditions}
    possible = [
        surgery.text
        for surgery in phrases.SURGERIES
        if narrator.stay.sex in surgery.sex and not groups.intersection(surgery.groups)
    ]
    if narrator.chance(0.6):
        items.append(narrator.say(possible, année=_years_ago(narrator, narrator.rng.randint(4, 15))))
    items += [narrator.exclude(item, phrases.NEVER_HAD) for item in traps.absent if item.kind == "chronic"]
    items += [_family(narrator, item) for item in traps.family]
    items.append(narrator.say(phrases.ALLERGIES))
    return [f"- {capitalise(item)}" for item in items]


def _drugs(narrator: NoteWriter, conditions: list[Condition], filler: bool = False) -> list[str]:
    """One prescription per line, each drug once."""
    lines = [narrator.treatment(item, item.drugs) for item in conditions if item.drugs]
    if filler:
        lines.append(narrator.say(phrases.FILLER_DRUGS))
    by_drug = {line.split()[0]: f"- {line}" for line in reversed(lines)}
    return list(reversed(by_drug.values()))


def _history(narrator: NoteWriter) -> list[str]:
    stay = narrator.stay
    sentences = [narrator.render(sentence) for sentence in _some(narrator, stay.dp.history, 2)]
    if stay.dr:
        sentences.append(narrator.name(stay.dr, phrases.RELATED))
        sentences += [narrator.render(sentence) for sentence in _some(narrator, stay.dr.history, 1)]
    return sentences


def _examination(narrator: NoteWriter) -> list[str]:
    affected = {system for condition in narrator.stay.conditions for system in condition.systems}
    normal = [narrator.say(lines) for system, lines in phrases.NORMAL_EXAMINATION.items() if system not in affected]
    found = [narrator.render(sentence) for sentence in _some(narrator, narrator.stay.dp.exam, 1)]
    return [narrator.say(phrases.VITAL_SIGNS), *found, *_some(narrator, normal, 4)]


def _tests(narrator: NoteWriter, conditions: list[Condition]) -> list[str]:
    sentences = [_laboratory(narrator)]
    sentences += [narrator.render(sentence) for sentence in _some(narrator, narrator.stay.dp.tests, 3)]
    sentences += [_associated(narrator, item) for item in conditions]
    return sentences


def _laboratory(narrator: NoteWriter) -> str:
    """Figures of the blood test: all those that a coded diagnosis moves, and some normal ones."""
    moved = {name for condition in narrator.stay.conditions for name, _, _ in condition.measures}
    items = []
    for name, measure in phrases.MEASURES.items():
        if measure.names and (name in moved or (measure.usual and narrator.chance(0.7))):
            items.append(f"{narrator.rng.choice(measure.names)} {narrator.render(f'{{{name}}}')} {measure.unit}")
    return narrator.say(phrases.LABORATORY, liste=", ".join(items))


def _course(narrator: NoteWriter, told: bool, conditions: list[Condition]) -> list[str]:
    stay = narrator.stay
    sentences = [] if told else [narrator.name(stay.dp, phrases.CONCLUSIONS)]
    sentences += [narrator.render(sentence) for sentence in stay.dp.care]
    return [*sentences, *(_associated(narrator, item) for item in conditions)]


def _conclusion(narrator: NoteWriter) -> list[str]:
    if narrator.chance(0.3):
        return []
    return [narrator.name(narrator.stay.dp, phrases.CLOSING_CONCLUSIONS)]


def _some(narrator: NoteWriter, sentences: tuple[str, ...] | list[str], most: int) -> list[str]:
    """A sample in the order given."""
    chosen = narrator.rng.sample(range(len(sentences)), min(most, len(sentences)))
    return [sentences[index] for index in sorted(chosen)]
