"""The rows that the benchmarks read: generated once and kept between runs; nothing is downloaded."""

import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.atomic import new_file
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import FictionalNote, write_notes
from utils.icd10.answers import build_answer
from utils.icd10.prompts import instruct_row

WORK_DIR = Path(tempfile.gettempdir()) / "recode-benchmarks"


def icd_file(megabytes: int) -> Path:
    """Return a jsonl file of this size with coded stays of one to three fictional notes each (median 2,000 tokens)."""
    return rows_file("stays", megabytes)


def rows_file(kind: str, megabytes: int) -> Path:
    """Return a jsonl file of this size with rows of a kind in `ROWS`."""
    name = "icd" if kind == "stays" else kind
    path = WORK_DIR / f"{name}-{megabytes}MB.jsonl"
    if path.is_file():
        return path
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=megabytes, unit="MB", desc=path.name, disable=None)
    with new_file(path) as temporary, temporary.open("wb") as file, progress as bar:
        for row in ROWS[kind](_notes()):
            bar.update(file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n") / 1e6)
            if file.tell() >= megabytes * 1e6:
                break
    return path


def _notes() -> Iterator[FictionalNote]:
    return write_notes(10**9, seed=0, catalogue=load_catalogue())


def _stays(notes: Iterator[FictionalNote]) -> Iterator[dict[str, Any]]:
    """Yield stays of 900 to 3,400 tokens, 6 % of them trained."""
    draw = random.Random(0)
    while True:
        stay = [next(notes) for _ in range(draw.randint(1, 3))]
        yield instruct_row("\n\n".join(note.text for note in stay), build_answer(stay[-1].diagnoses))


def _short_stays(notes: Iterator[FictionalNote]) -> Iterator[dict[str, Any]]:
    """Yield stays of about 620 tokens, 10 % of them trained."""
    for note in notes:
        yield instruct_row(" ".join(note.text.split()[:145]), build_answer(note.diagnoses[:2]))


def _chats(notes: Iterator[FictionalNote]) -> Iterator[dict[str, Any]]:
    """Yield chats of three exchanges, about 1,200 tokens, most of them trained."""
    words = (word for note in notes for word in note.text.split())
    while True:
        messages = [
            {"role": role, "content": " ".join(itertools.islice(words, length))}
            for _ in range(3)
            for role, length in (("user", 60), ("assistant", 110))
        ]
        yield {"messages": messages}


def _texts(notes: Iterator[FictionalNote]) -> Iterator[dict[str, Any]]:
    """Yield texts so long that few sequences contain more than one, all tokens trained."""
    while True:
        yield {"text": "\n\n".join(note.text for note in itertools.islice(notes, 256))}


ROWS: dict[str, Callable[[Iterator[FictionalNote]], Iterator[dict[str, Any]]]] = {
    "stays": _stays,
    "short_stays": _short_stays,
    "chats": _chats,
    "texts": _texts,
}
