"""Code stays with a command that is killed again and again: `python -m tests.end_to_end.kill_worklist --run RUN`.

Fictional stays are coded by `utils.code_stays`, a process that is killed (SIGKILL) at a random instant, started again,
and so on; then it runs to its end. Every stay must be in the journal exactly once with every line whole, and a second
run must code nothing. Prints how many stays were coded at each kill.
"""

import argparse
import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.support.documents import ROOT
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.icd10.codes import Cim10Table


def lines(journal: Path) -> list[bytes]:
    """Return the lines of the journal, the incomplete last one included."""
    return journal.read_bytes().splitlines(keepends=True) if journal.exists() else []


def kill_at_random(command: list[str], journal: Path, chance: random.Random, pace: float) -> None:
    """Start the command and kill it at a random instant after its first new stay.

    Args:
        command: the command.
        journal: of the worklist.
        chance: source of the instant.
        pace: longest time in seconds between the first stay and the kill.
    """
    before = len(lines(journal))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(lines(journal)) == before:
            time.sleep(0.01)
        time.sleep(chance.random() * pace)
        process.send_signal(signal.SIGKILL)
    print(f"killed with {len(lines(journal)):,} lines in the journal", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run or a model")
    parser.add_argument("--cim10", type=Path, default=ROOT / "example/demo_cim10.tsv", help="CIM-10 table")
    parser.add_argument("--stays", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--pace", type=float, default=20.0, help="seconds of work after which a process is killed at last"
    )
    parser.add_argument("--max_tokens", type=int, default=200)
    options = parser.parse_args()
    catalogue = load_catalogue(Cim10Table.from_file(options.cim10))
    notes = write_notes(options.stays, seed=0, catalogue=catalogue, length="short")
    with tempfile.TemporaryDirectory() as folder:
        export, out = Path(folder) / "export.csv", Path(folder) / "worklist"
        with export.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("stay", "text"), *((note.id, note.text) for note in notes)])
        command = [sys.executable, "-m", "utils.code_stays", "--stays", str(export), "--out", str(out)]
        command += ["--run", str(options.run.absolute()), "--cim10", str(options.cim10), "--batch_size", "50"]
        command += ["--max_tokens", str(options.max_tokens)]
        journal, chance = out / "journal.jsonl", random.Random(0)
        for _ in range(options.kills):
            kill_at_random(command, journal, chance, options.pace)
        outputs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in "12"]
        print(*outputs, sep="")
        assert "0 stays coded now" in outputs[1], "the second run coded stays"
        coded = Counter(json.loads(line)["stay"] for line in lines(journal))
        assert len(coded) == options.stays and set(coded.values()) == {1}, "a stay is missing, or there twice"
    print(f"{options.stays:,} stays, {options.kills} kills: each coded exactly once, the journal is whole.")


if __name__ == "__main__":
    main()
