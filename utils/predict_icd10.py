"""Codes notes with a trained model: `python -m utils.predict_icd10 --run RUN_DIR --notes N.jsonl --out P.jsonl`.

Notes are instruct rows (`messages`, what stands before the last answer is the prompt) or rows with `text`, in jsonl or
csv; `id` or `visit_occurence_id` names them, else their number. Each line of P.jsonl is `{"id", "answer", "codes"}`
with codes as `[{"role", "code", "label"}]`; P.csv has a line per code. A command that was interrupted goes on where it
stopped when it is given again; P.about.json says what the answers come from, and those of another model are refused.
"""

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finetune.cli import add_step_option, run_cli
from finetune.data.conversation import parse_conversation
from finetune.data.exceptions import RowError
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_trained, token_bytes
from finetune.run_dir import find_checkpoint, run_of
from model.errors import UserError
from model.generate import generate
from utils.icd10.answers import parse_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.constrain import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.prompts import prompt_messages
from utils.tables.jsonl import file_errors, read_journal, read_lines, save
from utils.tables.read_table import read_table

ID_COLUMNS = ("id", "visit_occurence_id")
CSV_COLUMNS = ("id", "role", "code", "label")


class Note(NamedTuple):
    id: str
    messages: list[dict[str, Any]]  # up to the answer


def read_notes(path: Path) -> list[Note]:
    """Reads the notes to code.

    Raises:
        UserError: a row without messages or text, or an id that stands twice.
    """
    notes: list[Note] = []
    seen: set[str] = set()
    for number, row in read_table(path):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: {row}.")
        name = str(next((row[key] for key in ID_COLUMNS if row.get(key) not in (None, "")), number))
        if name in seen:
            raise UserError(f"{path}, row {number}: the id {name} stands twice; each note needs its own.")
        seen.add(name)
        notes.append(Note(name, _prompt(row, f"{path}, row {number}")))
    if not notes:
        raise UserError(f"{path} holds no notes.")
    return notes


def _prompt(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if isinstance(row.get("text"), str) and row["text"].strip():
        return prompt_messages(row["text"])
    if not isinstance(row.get("messages"), list) or not row["messages"]:
        raise UserError(f"{where} has neither `text` nor `messages`: expected a note or a conversation about one.")
    messages = row["messages"]
    try:
        parsed = parse_conversation(row).messages
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
    question = messages[:-1] if parsed[-1].role == "assistant" else messages
    if not question:
        raise UserError(f"{where} holds an answer and no question.")
    return question


class Predictor:
    """A trained model that codes notes.

    Args:
        folder: of the training run, of one of its checkpoints, or of a model.
        table: codes that may be given; None: whatever the model writes.
        step: which checkpoint of a run: its number, or "best"; None: the newest.
    """

    def __init__(self, folder: Path, table: Cim10Table | None = None, step: int | str | None = None) -> None:
        self._model, tokenizer = load_trained(folder, step)
        self._encoder = SampleEncoder(tokenizer)
        self._tokenizer = tokenizer.tokenizer
        self._grammar = None
        if table is not None:
            pieces = token_bytes(tokenizer)
            self._vocabulary = Vocabulary(pieces, self._tokenizer.eos_id)
            # A SentencePiece text begins with a blank that decoding takes away.
            blank = " " if self._tokenizer.encode("a", bos=False, eos=False) != [pieces.index(b"a")] else ""
            self._grammar = AnswerGrammar(table, prefix=blank)

    def answers(self, notes: list[Note], max_tokens: int) -> list[str]:
        """Answers a batch of notes, greedily."""
        prompts = [
            self._encoder.encode_prompt(parse_conversation({"messages": note.messages}).messages) for note in notes
        ]
        constraints = None
        if self._grammar is not None:
            constraints = [AnswerConstraint(self._grammar, self._vocabulary) for _ in notes]
        outputs = generate(self._model, prompts, max_tokens, self._tokenizer.eos_id, constraints=constraints)
        if constraints is not None:
            return [constraint.text for constraint in constraints]
        return [self._tokenizer.decode(output).strip() for output in outputs]


def predictions(coder: Predictor, notes: list[Note], batch_size: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Yields `{"id", "answer", "codes"}` for each note, batch by batch; notes of like length stand together."""
    ordered = sorted(notes, key=lambda note: len(note.messages[-1]["content"]))
    with tqdm(total=len(notes), unit="note", disable=None) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            for note, answer in zip(batch, coder.answers(batch, max_tokens)):
                yield {"id": note.id, "answer": answer, "codes": [item._asdict() for item in parse_answer(answer)]}
            bar.update(len(batch))


def save_csv(jsonl: Path, path: Path) -> None:
    """Writes a line per code."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for _, line in read_lines(jsonl):
            row = json.loads(line)
            writer.writerows({"id": row["id"], **code} for code in row["codes"])


def code_notes(
    folder: Path,
    notes_file: Path,
    out: Path,
    table: Cim10Table | None = None,
    step: int | str | None = None,
    batch_size: int = 16,
    max_tokens: int = 512,
) -> str:
    """Codes the notes of a file that `out` does not hold yet, and says in a sentence what was done.

    Raises:
        UserError: notes, run or output cannot be used.
    """
    if out.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{out}: expected a name that ends in .jsonl or .csv.")
    notes = read_notes(notes_file)
    lines = out.with_suffix(".jsonl")
    if lines.resolve() == notes_file.resolve():
        raise UserError(f"The answers would go to {lines}, which holds the notes; give --out another name.")
    checkpoint = find_checkpoint(folder, step)
    about = {"run": _fingerprint(checkpoint), "notes": _sha256(notes_file.read_bytes()), "max_tokens": max_tokens}
    about["cim10"] = None if table is None else _sha256(repr(list(table)).encode())
    about["checkpoint"] = str(checkpoint)
    with file_errors():
        lines.parent.mkdir(parents=True, exist_ok=True)
        done = read_journal(lines)
        _require_same(lines, about, bool(done))
        to_do = [note for note in notes if note.id not in done]
        if to_do:
            print(f"Coding {len(to_do)} of {len(notes)} notes with {checkpoint} ...", file=sys.stderr, flush=True)
            coder = Predictor(checkpoint, table)
            with lines.open("a", encoding="utf-8") as file:
                for prediction in predictions(coder, to_do, batch_size, max_tokens):
                    file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
                    file.flush()
        if out.suffix == ".csv":
            save_csv(lines, out)
    before = f", {len(notes) - len(to_do)} of them before" if len(to_do) < len(notes) else ""
    return f"{len(notes)} notes coded{before}: {out}"


def _require_same(lines: Path, about: dict[str, Any], begun: bool) -> None:
    """Keeps beside `lines` what its answers come from; answers of different origins are not mixed.

    Raises:
        UserError: `lines` has begun with another origin.
    """
    path = lines.with_suffix(".about.json")
    if begun:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if other := [key for key in about if key != "checkpoint" and before.get(key) != about[key]]:
            raise UserError(
                f"{lines} holds answers that came from another {' and another '.join(other)}. Remove it to have all "
                "notes coded anew, or give --out another name."
            )
    save({path: json.dumps(about, indent=1)})


def _fingerprint(folder: Path) -> str:
    """Tells one checkpoint or model folder from another without reading its weights."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _sha256(repr((str(folder.resolve()), facts)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def answer_with_newest(folder: Path, rows: Path) -> Path:
    """Answers the rows of a file with a run's newest checkpoint, or the one named; finds its answers when asked again.

    Returns:
        The file of the answers, in the run folder.

    Raises:
        UserError: no checkpoint of a run, or rows that cannot be answered.
    """
    checkpoint = find_checkpoint(folder)
    run_dir = run_of(checkpoint)
    if run_dir is None:
        raise UserError(f"{folder} is no run folder (no args.yaml), nor a checkpoint in one.")
    answers = run_dir / "predictions" / f"{rows.stem}.{checkpoint.resolve().name}.jsonl"
    print(code_notes(checkpoint, rows, answers), file=sys.stderr)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a run, a checkpoint or a model")
    parser.add_argument("--notes", type=Path, required=True, help="jsonl or csv")
    parser.add_argument("--out", type=Path, required=True, help="jsonl, or csv (which keeps the jsonl beside it)")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="answers may name only codes of this CIM-10 table")
    add_step_option(parser)
    parser.add_argument("--batch_size", type=int, default=16, help="notes at a time (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    options = parser.parse_args()
    if options.batch_size < 1 or options.max_tokens < 1:
        raise UserError("--batch_size and --max_tokens must be at least 1.")
    table = Cim10Table.from_file(options.cim10) if options.cim10 else None
    sizes = (options.batch_size, options.max_tokens)
    print(code_notes(options.run, options.notes, options.out, table, options.step, *sizes))


if __name__ == "__main__":
    run_cli(main)
