"""Sentences of French notes, and the cues that a diagnosis in them is denied, a relative's or past."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.fictional_notes import phrases
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.note_writer import NoteWriter
from utils.fictional_notes.notes import write_notes
from utils.icd10.sentences import by_shared_words, marks, split_sentences


def texts(note: str) -> list[str]:
    return [note[sentence.start : sentence.end] for sentence in split_sentences(note)]


@pytest.mark.parametrize(
    "expected",
    [
        ["Patient de 60 ans.", "Toux depuis 3 jours."],
        ["Adressé par le Dr. Martin et Mme. B. Dupont.", "Sortie à J5."],
        ["Fièvre à 38.5 °C, CRP 12.4 mg/L.", "Pas d'antibiotique !", "Pourquoi ?", "Voir cf. Annexe."],
        ["Vu env. 3 fois, réf. 12, p. ex. Dimanche."],
        ["1. HTA.", "2. Diabète (type 2).", "- Asthme."],
        ["Il est sorti le 12.03.2024.", "« Contrôle » à un mois."],
        ["Portage du virus de l'hépatite C.", "Mme B. D. Roux est suivie pour une carence en vitamine D.", "Sortie."],
        ["Amoxicilline 1 g/j pendant 7 j.", "Retour au domicile."],
    ],
)
def test_sentences_end_where_a_reader_ends_them(expected: list[str]) -> None:
    assert texts(" ".join(expected)) == expected
    assert texts("\n".join(expected)) == expected


def test_lines_end_sentences_and_headings_are_none() -> None:
    note = "## CRH\n\nMotif : toux\r\n- HTA\n- Asthme. Tabac\n\n---\n## OBS\n\nRAS"
    assert texts(note) == ["Motif : toux", "- HTA", "- Asthme.", "Tabac", "RAS"]


@given(st.text("aé .\nM1!-#", max_size=60))
def test_every_letter_is_in_one_sentence(note: str) -> None:
    covered = [place for sentence in split_sentences(note) for place in range(sentence.start, sentence.end)]
    assert covered == sorted(set(covered))
    in_headings = sum(len(line) for line in note.split("\n") if line.startswith(("# ", "## ", "### ", "#### ")))
    assert sum(note[place].isalnum() for place in range(len(note)) if place not in set(covered)) <= in_headings


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Pas d'argument pour un diabète.", ["negation"]),
        ("L'hypothèse d'un diabète n'est pas retenue.", ["negation"]),
        ("Les examens ne retrouvent pas de diabète.", ["negation"]),
        ("HTA, pas de thyroïdopathie, diabète traité par metformine.", []),
        ("Antécédents : diabète chez sa mère, HTA.", ["family"]),
        ("Antécédents : HTA chez sa mère, diabète.", []),
        ("Antécédents : mère : diabète, HTA.", ["family"]),
        ("Ancien diabète gestationnel (guéri en 2011).", ["past"]),
        ("Découverte d'un diabète.", []),
        ("Glycémie à 3 g/L, sans acidose.", ["negation"]),  # no shared word: the whole sentence
    ],
)
def test_cues_count_next_to_the_diagnosis(sentence: str, expected: list[str]) -> None:
    assert marks(sentence, "Diabète sucré de type 2") == expected


def test_the_baseline_prefers_rare_shared_words() -> None:
    note = ["Patient diabétique de type inconnu.", "Diabète sucré ancien.", "Toux de type sec."]
    scores = by_shared_words(note, "Diabète sucré de type 2")
    assert max(scores) == scores[1] and scores[0] > 0 and by_shared_words(note, "Fracture") == [0, 0, 0]


def test_distractors_of_fictional_notes_are_marked_and_coded_diagnoses_hardly_ever(monkeypatch) -> None:
    kinds = {phrases.PAST: "past", phrases.FAMILY: "family", phrases.ABSENT: "negation", phrases.NEVER_HAD: "negation"}
    distracting: list[tuple[str, str]] = []
    original = NoteWriter.write_uncoded

    def recorded(writer: NoteWriter, condition, templates, **slots) -> str:
        text = original(writer, condition, templates, **slots)
        distracting.append((text, kinds[templates]))
        return text

    monkeypatch.setattr(NoteWriter, "write_uncoded", recorded)
    unmarked, marked, coded = 0, 0, 0
    for note in write_notes(60, 3, load_catalogue(), "short"):
        sentences = texts(note.text)
        for text, kind in distracting:
            unmarked += kind not in next(marks(each, text) for each in sentences if text in each)
        for _, start, end in note.statements:
            around = next(each for each in split_sentences(note.text) if each.start <= start < each.end)
            marked += bool(marks(note.text[around.start : around.end], note.text[start:end]))
            coded += 1
        distracting.clear()
    assert unmarked == 0 and marked < coded / 20 and coded > 100
