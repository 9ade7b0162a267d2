"""Fictional discharge notes with their codes: offline, seeded, for demos and tests, never for evaluating care.

Coded diagnoses appear in varied wordings, mixed with distractors that must not be coded (diagnoses ruled out, resolved
episodes, relatives' diseases), so that no single sentence gives the answer.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from utils.fictional_notes import phrases
from utils.fictional_notes.catalogue import Catalogue, Condition
from utils.fictional_notes.distractors import Distractors, choose_distractors
from utils.fictional_notes.note_writer import WORDINGS, NoteWriter, capitalize
from utils.fictional_notes.scenarios import MAX_DAS, FictionalStay, sample_stay
from utils.icd10.answers import Diagnosis

LENGTHS = ("short", "long")
_SHORT_MAX_DAS = 4  # associated diagnoses that fit in a note of about 100 tokens


class Statement(NamedTuple):
    """Where a note states a coded diagnosis: its characters [start, end)."""

    code: str
    start: int
    end: int


@dataclass(frozen=True)
class FictionalNote:
    """A note and the codes that a medical coder would keep; DAS are in the order in which the note mentions them.

    `statements` is empty for notes that a model wrote.
    """

    id: str
    text: str
    diagnoses: tuple[Diagnosis, ...]
    statements: tuple[Statement, ...] = ()


def write_notes(
    count: int, seed: int, catalogue: Catalogue, length: str = "long", wordings: str = "all"
) -> Iterator[FictionalNote]:
    """Yield notes. A larger `count` only appends notes; `wordings` does not change the stays.

    Args:
        count: number of notes.
        seed: same seed, same notes.
        catalogue: diagnoses to draw from.
        length: "short" (about 100 tokens) or "long" (about 600 to 1500).
        wordings: "train", "unseen" (wordings that "train" never uses) or "all".
    """
    for index in range(count):
        rng, stay = seeded_stay(index, seed, catalogue, length)
        writer = NoteWriter(rng, stay, WORDINGS[wordings])
        compose = _short_note if length == "short" else _long_note
        text = compose(writer, choose_distractors(rng, stay, catalogue, length))
        name = hashlib.sha1(f"{seed} {length} {wordings} {index}".encode(), usedforsecurity=False).hexdigest()
        yield FictionalNote(name, text, _in_note_order(stay, writer.mentioned), tuple(_statements(text, writer.stated)))


def _statements(note: str, stated: Sequence[tuple[str, str, str]]) -> Iterator[Statement]:
    """Yield where the note has the name in each text, which begins with a capital letter in some lists."""
    for code, text, name in dict.fromkeys(stated):
        pattern = rf"(?<!\w)(?:{re.escape(text)}|{re.escape(capitalize(text))})(?!\w)"
        place = text.lower().index(name)
        for found in re.finditer(pattern, note):
            yield Statement(code, found.start() + place, found.start() + place + len(name))


def seeded_stay(index: int, seed: int, catalogue: Catalogue, length: str) -> tuple[random.Random, FictionalStay]:
    """Return the stay of note `index` and the random generator with which to write the note."""
    rng = random.Random(f"{seed} {length} {index}")
    return rng, sample_stay(rng, catalogue, _SHORT_MAX_DAS if length == "short" else MAX_DAS)


def _in_note_order(stay: FictionalStay, mentioned: list[str]) -> tuple[Diagnosis, ...]:
    diagnoses = stay.diagnoses()
    reasons = len(stay.reasons)
    return (*diagnoses[:reasons], *sorted(diagnoses[reasons:], key=lambda diagnosis: mentioned.index(diagnosis.code)))


# --- Sentences of both lengths ----------------------------------------------------------------------------------------


def _past(writer: NoteWriter, condition: Condition) -> str:
    # Neither before the minimum age of the disease nor so recent that it could still be active.
    years = writer.rng.randint(3, max(3, min(25, writer.stay.age - condition.age[0])))
    return writer.write_uncoded(condition, phrases.PAST, année=_years_ago(writer, years), ancienneté=str(years))


def _years_ago(writer: NoteWriter, years: int) -> str:
    return str(int(writer.fill("{année_du_séjour}")) - years)


def _family(writer: NoteWriter, condition: Condition) -> str:
    sex = writer.rng.choice(condition.sex)
    relative = writer.rng.choice(phrases.RELATIVES[sex])
    slots = {"parent": relative, "son_parent": ("sa " if sex == "F" else "son ") + relative}
    return writer.write_uncoded(condition, phrases.FAMILY, e_parent="e" if sex == "F" else "", **slots)


def _associated(writer: NoteWriter, condition: Condition) -> str:
    """Write a sentence on an associated diagnosis outside the medical history."""
    templates: Sequence[str] = {
        "chronic": phrases.COMORBIDITIES,
        "bio": phrases.IN_BLOOD_TEST,
        "imaging": phrases.ON_IMAGING,
        "event": phrases.DURING_STAY,
    }[condition.kind]
    if writer.stay.days < 3:
        templates = [template for template in templates if "{jour}" not in template]
    return writer.write_coded(condition, templates, suite=_managed(writer, condition, ", "))


def _managed(writer: NoteWriter, condition: Condition, separator: str = " ") -> str:
    managed = writer.treatment(condition, condition.managed)
    return separator + managed if managed and writer.chance(0.5) else ""


def _history_item(writer: NoteWriter, condition: Condition) -> str:
    return writer.write_coded(condition, ("{nu}",)) + _managed(writer, condition)


def _shuffled(writer: NoteWriter, items_of: dict[Callable[[NoteWriter, Condition], str], list[Condition]]) -> list[str]:
    """Write the diagnoses of each function with that function, in random order."""
    pairs = [(write, item) for write, items in items_of.items() for item in items]
    writer.rng.shuffle(pairs)
    return [write(writer, item) for write, item in pairs]


def _split_das(writer: NoteWriter) -> tuple[list[Condition], list[Condition]]:
    """Split the associated diagnoses into those mentioned in the medical history and those mentioned later."""
    early = [item for item in writer.stay.das if item.kind == "chronic" and writer.chance(0.8)]
    return early, [item for item in writer.stay.das if item not in early]


def _discharge(writer: NoteWriter) -> str:
    stay = writer.stay
    if stay.days == 0:
        return writer.write(phrases.DISCHARGES["same day"])
    return writer.write(phrases.DISCHARGES["frail" if stay.age >= 80 and stay.days >= 5 else "home"])


def _admission_reason(writer: NoteWriter, templates: tuple[str, ...]) -> tuple[str, bool]:
    """Write the first sentence; the second value is True if it names the main diagnosis rather than a complaint."""
    main = writer.stay.dp
    if main.complaints and writer.chance(0.5):
        return writer.write_wording(writer.rng.choice(main.complaints), templates), False
    return writer.write_coded(main, templates), True


# --- Short notes ------------------------------------------------------------------------------------------------------


def _short_note(writer: NoteWriter, distractors: Distractors) -> str:
    rng, stay = writer.rng, writer.stay
    reason, dp_named = _admission_reason(writer, phrases.SHORT_ADMISSION_REASONS)
    early, late = _split_das(writer)
    items = _shuffled(writer, {_history_item: early, _past: distractors.past, _family: distractors.family})
    sentences = [reason]
    if items:
        sentences.append(writer.write(phrases.MEDICAL_HISTORY, liste=", ".join(items)))
    findings = (*stay.dp.history, *stay.dp.exam, *stay.dp.tests)
    if findings and writer.chance(0.6):
        sentences.append(writer.write(findings))
    body = [] if dp_named else [writer.write_coded(stay.dp, phrases.CONCLUSIONS)]
    body += [writer.write_coded(stay.dr, phrases.RELATED)] if stay.dr else []
    body += [writer.write_uncoded(item, phrases.ABSENT) for item in distractors.absent]
    rng.shuffle(body)
    sentences += body + [_associated(writer, item) for item in late]
    return " ".join([*sentences, _discharge(writer)])


# --- Long notes -------------------------------------------------------------------------------------------------------


def _long_note(writer: NoteWriter, distractors: Distractors) -> str:
    reason, dp_named = _admission_reason(writer, phrases.ADMISSION_REASONS)
    early, late = _split_das(writer)
    on_imaging = [item for item in late if item.kind in ("imaging", "bio") and writer.chance(0.7)]
    during = [item for item in late if item not in on_imaging]
    ruled_out = [writer.write_uncoded(item, phrases.ABSENT) for item in distractors.absent if item.kind != "chronic"]
    sections = {"motif": [writer.write(phrases.ADMISSIONS[writer.stay.dp.scheduled]), reason]}
    sections["antécédents"] = _medical_history(writer, early, distractors)
    sections["entrée"] = _drugs(writer, early)
    sections["vie"] = [writer.write(phrases.LIVING_SITUATIONS["active" if writer.stay.age < 62 else "retired"])]
    sections["histoire"] = _present_illness(writer)
    sections["examen"] = _examination(writer)
    sections["examens"] = [*_tests(writer, on_imaging), *ruled_out]
    sections["évolution"] = _course(writer, dp_named, during)
    sections["conclusion"] = _conclusion(writer)
    sections["sortie"] = _drugs(writer, [*writer.stay.reasons, *writer.stay.das], filler=True)
    sections["suivi"] = [_discharge(writer), writer.write(phrases.FOLLOW_UPS)]
    if writer.chance(0.4):
        del sections["vie"]
    style = writer.rng.choice(phrases.HEADING_STYLES)
    parts = [_heading(writer, key, lines, style) for key, lines in sections.items() if lines]
    return "\n\n".join([_header(writer), *parts, writer.write(phrases.SIGNATURES)])


def _header(writer: NoteWriter) -> str:
    lines = [
        writer.write(phrases.TITLES),
        f"{writer.write(phrases.PLACES)} - Service : {writer.stay.dp.service}",
        writer.write(phrases.IDENTITIES),
        writer.write(phrases.DATES),
    ]
    if writer.chance(0.5):
        lines.append(writer.write(phrases.LETTER_OPENINGS))
    return "\n".join(lines)


def _heading(writer: NoteWriter, key: str, lines: list[str], style: str) -> str:
    title = writer.rng.choice(phrases.HEADINGS[key])
    text = "\n".join(lines) if lines[0].startswith("- ") else " ".join(lines)
    if text.startswith("- "):
        style = style.replace("{titre} : {texte}", "{titre} :\n{texte}")
    return style.format(titre=title, TITRE=title.upper(), texte=text)


def _medical_history(writer: NoteWriter, early: list[Condition], distractors: Distractors) -> list[str]:
    """Write one list item per line: active and past diseases, surgery, diseases never had, family, allergies."""
    items = _shuffled(writer, {_history_item: early, _past: distractors.past})
    groups = {condition.group for condition in writer.stay.conditions}
    possible = [
        surgery.text
        for surgery in phrases.SURGERIES
        if writer.stay.sex in surgery.sex and not groups.intersection(surgery.groups)
    ]
    if writer.chance(0.6):
        items.append(writer.write(possible, année=_years_ago(writer, writer.rng.randint(4, 15))))
    items += [writer.write_uncoded(item, phrases.NEVER_HAD) for item in distractors.absent if item.kind == "chronic"]
    items += [_family(writer, item) for item in distractors.family]
    items.append(writer.write(phrases.ALLERGIES))
    return [f"- {capitalize(item)}" for item in items]


def _drugs(writer: NoteWriter, conditions: list[Condition], filler: bool = False) -> list[str]:
    """Write one prescription per line; each drug is listed once."""
    lines = [writer.treatment(item, item.drugs) for item in conditions if item.drugs]
    if filler:
        lines.append(writer.write(phrases.FILLER_DRUGS))
    by_drug = {line.split()[0]: f"- {line}" for line in reversed(lines)}
    return list(reversed(by_drug.values()))


def _present_illness(writer: NoteWriter) -> list[str]:
    stay = writer.stay
    sentences = [writer.fill(sentence) for sentence in _some(writer, stay.dp.history, 2)]
    if stay.dr:
        sentences.append(writer.write_coded(stay.dr, phrases.RELATED))
        sentences += [writer.fill(sentence) for sentence in _some(writer, stay.dr.history, 1)]
    return sentences


def _examination(writer: NoteWriter) -> list[str]:
    affected = {system for condition in writer.stay.conditions for system in condition.systems}
    normal = [writer.write(lines) for system, lines in phrases.NORMAL_EXAMINATION.items() if system not in affected]
    found = [writer.fill(sentence) for sentence in _some(writer, writer.stay.dp.exam, 1)]
    return [writer.write(phrases.VITAL_SIGNS), *found, *_some(writer, normal, 4)]


def _tests(writer: NoteWriter, conditions: list[Condition]) -> list[str]:
    sentences = [_laboratory(writer)]
    sentences += [writer.fill(sentence) for sentence in _some(writer, writer.stay.dp.tests, 3)]
    sentences += [_associated(writer, item) for item in conditions]
    return sentences


def _laboratory(writer: NoteWriter) -> str:
    """Write the blood test: all measurements that a coded diagnosis changes, and some normal ones."""
    changed = {name for condition in writer.stay.conditions for name, _, _ in condition.measures}
    items = []
    for name, measure in phrases.MEASURES.items():
        if measure.names and (name in changed or (measure.usual and writer.chance(0.7))):
            items.append(f"{writer.rng.choice(measure.names)} {writer.fill(f'{{{name}}}')} {measure.unit}")
    return writer.write(phrases.LABORATORY, liste=", ".join(items))


def _course(writer: NoteWriter, dp_named: bool, conditions: list[Condition]) -> list[str]:
    stay = writer.stay
    sentences = [] if dp_named else [writer.write_coded(stay.dp, phrases.CONCLUSIONS)]
    sentences += [writer.fill(sentence) for sentence in stay.dp.care]
    return [*sentences, *(_associated(writer, item) for item in conditions)]


def _conclusion(writer: NoteWriter) -> list[str]:
    if writer.chance(0.3):
        return []
    return [writer.write_coded(writer.stay.dp, phrases.CLOSING_CONCLUSIONS)]


def _some(writer: NoteWriter, sentences: Sequence[str], count: int) -> list[str]:
    """Draw at most `count` sentences and keep their order."""
    chosen = writer.rng.sample(range(len(sentences)), min(count, len(sentences)))
    return [sentences[index] for index in sorted(chosen)]
