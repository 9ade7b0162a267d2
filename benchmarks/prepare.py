"""Wall time and memory of the preparation of many stays, on one core.

`python -m benchmarks.prepare [--stays 100000] [--rounds 3]` measures and appends to results/prepare.jsonl; `--show`
prints the last table. The notes are fictional, with their words in random order, so that all are different.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.data import WORK_DIR
from benchmarks.measure import ROOT, last_record, measure, print_table, spread
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.generate_notes import table_of

COLUMNS = {
    "stays": lambda result: f"{result['stays']:,}",
    "notes, MB": lambda result: spread(result["note_bytes"], 1e6, 0),
    "seconds": lambda result: spread(result["seconds"]),
    "CPU s": lambda result: spread(result["cpu_seconds"]),
    "peak RSS, MB": lambda result: spread(result["peak_bytes"], 1e6, 0),
}
_DIFFERENT = 400  # notes whose words are shuffled


def write_stays(number: int, folder: Path) -> dict[str, Path]:
    """Write tables of fictional stays, two per patient, and the CIM-10 table; return the files by option."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"text": folder / "text.csv", "codes": folder / "codes.csv", "cim10": folder / "cim10.tsv"}
    catalogue = load_catalogue()
    notes = list(write_notes(min(number, _DIFFERENT), 0, catalogue, "long"))
    rng = random.Random(0)
    with files["text"].open("w", newline="") as text, files["codes"].open("w", newline="") as codes:
        texts, rows = csv.writer(text), csv.writer(codes)
        texts.writerow(("stay", "patient", "text"))
        rows.writerow(("stay", "role", "code"))
        for stay in range(number):
            note = notes[stay % len(notes)]
            words = note.text.split()
            rng.shuffle(words)
            texts.writerow((stay, stay // 2, " ".join(words)))
            rows.writerows((stay, item.role, item.code) for item in note.diagnoses)
    lines = (f"{e.code}|{e.type}|N|0|{e.short_label}|{e.label}\n" for e in table_of(catalogue))
    files["cim10"].write_text("".join(lines), encoding="utf-8")
    return files


def prepare(case: dict[str, Any]) -> dict[str, float]:
    """Run the command as a user would, including imports, on one core where the system allows it to be chosen."""
    folder = WORK_DIR / "prepare"
    files = write_stays(case["stays"], folder)
    command = [sys.executable, "-m", "utils.prepare_icd10_data", "--out", str(folder / "data"), "--overwrite"]
    command += [part for option, path in files.items() for part in (f"--{option}", str(path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the command inherits it
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed: run it to see why.")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "note_bytes": files["text"].stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    options = parser.parse_args()
    cases = [{"stays": number} for number in (options.stays // 10, options.stays)]
    print_table(last_record("prepare") if options.show else measure("prepare", cases, options.rounds, prepare), COLUMNS)


if __name__ == "__main__":
    main()
