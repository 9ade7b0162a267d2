"""Answer the rows of a file with a trained model; an interrupted call continues where it stopped."""

import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finetune.data.conversation import parse_conversation
from finetune.data.exceptions import RowError
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_trained, token_bytes
from finetune.run_dir import find_checkpoint, run_of
from model.atomic import owner_only
from model.errors import UserError
from model.generate import generate
from model.wording import counted
from utils.icd10.answers import parse_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.mapping import NOTE_FIELDS, Columns, TableMapping, find_columns, read_mapping
from utils.icd10.note_text import note_text
from utils.icd10.predictions import origin_path, read_origin
from utils.icd10.prompts import prompt_messages
from utils.icd10.stays import LeftOut, read_header, read_notes, require_used
from utils.tables.csv_cells import CsvWriter
from utils.tables.encodings import AUTO
from utils.tables.jsonl import SkippedRowError, file_errors, read_journal, read_lines, require_own_names, save
from utils.tables.read_table import read_table

CSV_COLUMNS = ("id", "role", "code", "label")
LEFT_OUT_SUFFIX = ".left_out.csv"
ID_COLUMNS = ("id", "visit_occurence_id")  # of conversations


class Prompt(NamedTuple):
    """A row without its answer."""

    id: str
    row: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.row["messages"]


def read_prompts(
    path: Path, encoding: str = AUTO, mapping: TableMapping | None = None
) -> tuple[list[Prompt], list[LeftOut]]:
    """Return the prompts of a file, and the rows that have none.

    A row has a document of a stay, as in `utils.prepare_icd10_data`: one prompt per stay; or the `messages` of a
    conversation, answered from its last question.

    Raises:
        UserError: the file cannot be read, has no usable row, or two conversations have the same id.
    """
    mapping = mapping or read_mapping(None)
    header = read_header(path, encoding)
    if not header:
        raise UserError(f"{path} has no rows; expected a note or a question per row.")
    if "messages" in header:
        prompts, left_out = _conversations(path, encoding)
    else:
        columns = find_columns(path, "notes", header, mapping, rows_are_stays=True)
        require_used(mapping, {path: columns}, NOTE_FIELDS)
        prompts, left_out = _notes(path, columns, encoding, joined="stay" in mapping.of("notes"))
    if not prompts:
        raise UserError(f"{path} has no note or question that can be answered: {_count_reasons(left_out)}.")
    return prompts, left_out


def _notes(path: Path, columns: Columns, encoding: str, joined: bool) -> tuple[list[Prompt], list[LeftOut]]:
    left_out: list[LeftOut] = []
    notes = read_notes(path, columns, encoding, left_out, numbered=True)
    if columns.names.get("stay") == ["id"] and not joined:
        for row_id in notes:
            if notes.count_documents(row_id) > 1:
                raise UserError(
                    f"{path}: duplicate id {row_id}; give --columns stay=id to join the documents of an id."
                )
    stays = [stay for stay in notes if notes.has_text(stay)]
    return [Prompt(stay, {"messages": prompt_messages(notes[stay])}) for stay in stays], left_out


def _conversations(path: Path, encoding: str) -> tuple[list[Prompt], list[LeftOut]]:
    prompts: dict[str, Prompt] = {}
    left_out: list[LeftOut] = []
    for number, row in read_table(path, encoding):
        row_id = ""
        try:
            if not isinstance(row, dict):
                raise row
            row_id = str(next((row[key] for key in ID_COLUMNS if row.get(key) not in (None, "")), number))
            if row_id in prompts:
                raise UserError(f"{path}, row {number}: duplicate id {row_id}; each conversation needs its own.")
            prompts[row_id] = Prompt(row_id, _question(row))
        except SkippedRowError as skip:
            left_out.append(LeftOut("row", skip.reason, row_id, where=f"{path}, row {number}"))
    return list(prompts.values()), left_out


def _question(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the messages before the last answer, or those of a note.

    Raises:
        SkippedRowError: the row has neither.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        if row.get("text") is None:
            raise SkippedRowError("neither `text` nor `messages`")
        return {"messages": prompt_messages(note_text(row["text"])[0])}
    try:
        parsed = parse_conversation(row).messages
    except RowError as error:
        raise SkippedRowError("not a conversation", str(error)) from error
    question = messages[:-1] if parsed[-1].role == "assistant" else messages
    if not question:
        raise SkippedRowError("an answer without a question")
    return row | {"messages": question}  # with its system prompt and tools


class Predictor:
    """A trained model that answers prompts.

    Args:
        folder: folder of a run, a checkpoint or a model.
        table: codes that answers may contain; None for unconstrained answers.
        step: checkpoint of a run: a step number or "best"; None for the latest.
    """

    def __init__(self, folder: Path, table: Cim10Table | None = None, step: int | str | None = None) -> None:
        self._model, tokenizer = load_trained(folder, step)
        self._encoder = SampleEncoder(tokenizer)
        self._tokenizer = tokenizer.tokenizer
        self._grammar = None
        if table is not None:
            pieces = token_bytes(tokenizer)
            self._vocabulary = Vocabulary(pieces, self._tokenizer.eos_id)
            # SentencePiece starts a string with a space, which decoding removes.
            space = " " if self._tokenizer.encode("a", bos=False, eos=False) != [pieces.index(b"a")] else ""
            self._grammar = AnswerGrammar(table, prefix=space)

    def answers(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str]:
        """Answer a batch of prompts with greedy decoding."""
        conversations = [parse_conversation(prompt.row) for prompt in prompts]
        encoded = [self._encoder.encode_prompt(asked.messages, asked.tools) for asked in conversations]
        constraints = None
        if self._grammar is not None:
            constraints = [AnswerConstraint(self._grammar, self._vocabulary) for _ in prompts]
        outputs = generate(self._model, encoded, max_tokens, self._tokenizer.eos_id, constraints=constraints)
        if constraints is not None:
            return [constraint.text for constraint in constraints]
        return [self._tokenizer.decode(output).strip() for output in outputs]


class Answered(NamedTuple):
    """What a call did.

    Attributes:
        summary: a line on the answers.
        warning: a sentence on the rows that were not used, "" if there are none.
        complete: whether every stay has an answer.
    """

    summary: str
    warning: str
    complete: bool


def predict_file(
    folder: Path,
    rows: Path,
    out: Path,
    table: Cim10Table | None = None,
    step: int | str | None = None,
    batch_size: int = 16,
    max_tokens: int = 512,
    encoding: str = AUTO,
    mapping: TableMapping | None = None,
) -> Answered:
    """Answer the rows of a file that are not yet in `out`; rows that have no note are listed, not answered.

    Args:
        folder: folder of a run, a checkpoint or a model.
        rows: file of notes or conversations.
        out: .jsonl file of the answers, or a .csv file of their codes, written in addition to the .jsonl file.
        table: codes that answers may contain; None for unconstrained answers.
        step: checkpoint of a run: a step number or "best"; None for the latest.
        batch_size: rows per batch.
        max_tokens: maximum length of an answer.
        encoding: encoding of `rows`, for text formats.
        mapping: columns of `rows`.

    Raises:
        UserError: the rows, the run or the output cannot be used.
    """
    if out.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{out}: expected a name that ends in .jsonl or .csv.")
    prompts, left_out = read_prompts(rows, encoding, mapping)
    answers = out.with_suffix(".jsonl")
    require_own_names({out, answers, origin_path(answers), answers.with_suffix(LEFT_OUT_SUFFIX)}, [rows])
    _require_own_csv(out)
    checkpoint = find_checkpoint(folder, step)
    identity = {
        "run": _fingerprint(checkpoint),
        "notes": _sha256(rows.read_bytes()),
        "max_tokens": max_tokens,
        "cim10": None if table is None else _sha256(repr(list(table)).encode()),
    }
    with file_errors():
        answers.parent.mkdir(parents=True, exist_ok=True)
        if done := read_journal(answers):
            _require_same_origin(answers, identity)
        to_do = [prompt for prompt in prompts if prompt.id not in done]
        if to_do:
            save({origin_path(answers): json.dumps(identity | _origin(checkpoint), ensure_ascii=False, indent=1)})
            print(f"Answering {len(to_do)} of {len(prompts)} rows with {checkpoint} ...", file=sys.stderr, flush=True)
            predictor = Predictor(checkpoint, table)
            with open(answers, "a", encoding="utf-8", opener=owner_only) as file:
                for prediction in _predictions(predictor, to_do, batch_size, max_tokens):
                    file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
                    file.flush()
        if out.suffix == ".csv":
            _save_csv(answers, out)
        _save_left_out(left_out, answers.with_suffix(LEFT_OUT_SUFFIX))
    earlier = f" ({len(prompts) - len(to_do)} from an earlier call)" if len(to_do) < len(prompts) else ""
    answered = {prompt.id for prompt in prompts}
    summary = f"{counted(len(prompts), 'answer')}{earlier}: {out}"
    return Answered(summary, _describe_left_out(left_out, answers), all(row.stay in answered for row in left_out))


def _save_left_out(left_out: Sequence[LeftOut], path: Path) -> None:
    """Write the rows without answer, or remove the file of an earlier call if there are none."""
    if not left_out:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = CsvWriter(text, LeftOut._fields)
    for found in left_out:
        writer.write(*found)
    save({path: text.getvalue()})


def _describe_left_out(left_out: Sequence[LeftOut], answers: Path) -> str:
    if not left_out:
        return ""
    shown = ", ".join(found.stay or found.where for found in left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    listed = answers.with_suffix(LEFT_OUT_SUFFIX)
    unused = counted(len(left_out), "row was", "rows were")
    return f"{unused} not used ({shown}): {_count_reasons(left_out)}. See {listed}."


def _count_reasons(left_out: Sequence[LeftOut]) -> str:
    counts = Counter(found.reason for found in left_out)
    return "; ".join(f"{reason}: {count}" for reason, count in counts.items()) or "no rows"


def _predictions(
    predictor: Predictor, prompts: list[Prompt], batch_size: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield `{"id", "answer", "codes"}` for each prompt; batches contain prompts of similar length."""
    ordered = sorted(prompts, key=lambda prompt: len(str(prompt.messages[-1])))
    with tqdm(total=len(prompts), unit="row", disable=None) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            for prompt, answer in zip(batch, predictor.answers(batch, max_tokens)):
                yield {"id": prompt.id, "answer": answer, "codes": [item._asdict() for item in parse_answer(answer)]}
            bar.update(len(batch))


def _save_csv(answers: Path, path: Path) -> None:
    """Write one line per code; a missing value is empty."""
    buffer = io.StringIO()
    writer = CsvWriter(buffer, CSV_COLUMNS)
    for _, line in read_lines(answers):
        row = json.loads(line)
        for code in row["codes"]:
            writer.write(row["id"], *(code.get(column) for column in CSV_COLUMNS[1:]))
    save({path: buffer.getvalue()})


def _require_own_csv(path: Path) -> None:
    """Raise UserError if a csv file exists and does not begin like one of this command."""
    if path.suffix == ".csv" and path.exists():
        with file_errors(), path.open("rb") as file:
            header = file.readline().decode("utf-8", "replace").strip()
            if header not in ("", ",".join(CSV_COLUMNS)):
                raise UserError(f"{path} exists and is not an output of this command; choose another file.")


def _origin(checkpoint: Path) -> dict[str, Any]:
    """Return what an evaluation shows about the answers; links such as `best` are replaced by the checkpoint's name."""
    run_dir = run_of(checkpoint)
    named = checkpoint.with_name(checkpoint.resolve().name) if run_dir else checkpoint
    answered = f"{datetime.now():%Y-%m-%d %H:%M}"
    return {"run_name": run_dir and run_dir.name, "checkpoint": str(named), "answered": answered}


def _require_same_origin(answers: Path, identity: dict[str, Any]) -> None:
    """Raise UserError unless the answers in the file have this origin: answers of different origins are not mixed."""
    before = read_origin(answers)
    if different := [key for key in identity if before.get(key) != identity[key]]:
        raise UserError(
            f"{answers} was written with a different {', '.join(different)}; delete it or choose another --out."
        )


def _fingerprint(folder: Path) -> str:
    """Return a hash that identifies a checkpoint or model folder, without reading its weights."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _sha256(repr((str(folder.resolve()), facts)).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def predict_in_run_dir(folder: Path, rows: Path) -> Path:
    """Answer the rows of a file with a run's latest checkpoint, or with the given checkpoint, unless done before.

    Returns:
        The file of the answers, in the `predictions` folder of the run.

    Raises:
        UserError: the folder is not in a run, or the rows cannot be answered.
    """
    checkpoint = find_checkpoint(folder)
    run_dir = run_of(checkpoint)
    if run_dir is None:
        raise UserError(f"{folder} is neither a run folder (no args.yaml) nor a checkpoint in one.")
    answers = run_dir / "predictions" / f"{rows.stem}.{checkpoint.resolve().name}.jsonl"
    answered = predict_file(checkpoint, rows, answers)
    print(answered.summary, file=sys.stderr)
    if answered.warning:
        print(f"warning: {answered.warning}", file=sys.stderr)
    return answers
