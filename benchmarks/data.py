"""The rows the benchmarks read: made once by our own generator and kept between runs; nothing is downloaded."""

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from utils.icd10.answers import build_answer
from utils.icd10.catalogue import load_catalogue
from utils.icd10.notes import write_notes
from utils.icd10.prompts import instruct_row

WORK_DIR = Path(tempfile.gettempdir()) / "recode-benchmarks"


def icd_file(megabytes: int) -> Path:
    """A jsonl file of this size; each row is a stay of one to three fictional notes, coded (median 2,000 tokens)."""
    path = WORK_DIR / f"icd-{megabytes}MB.jsonl"
    if path.is_file():
        return path
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file, tqdm(total=megabytes, unit="MB", desc=path.name, disable=None) as bar:
        for line in _rows():
            bar.update(file.write(line) / 1e6)
            if file.tell() >= megabytes * 1e6:
                break
    return aside.replace(path)


def _rows() -> Iterator[bytes]:
    draw = random.Random(0)
    notes = write_notes(10**9, seed=0, catalogue=load_catalogue())
    while True:
        stay = [next(notes) for _ in range(draw.randint(1, 3))]
        row = instruct_row("\n\n".join(note.text for note in stay), build_answer(stay[-1].diagnoses))
        yield json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
