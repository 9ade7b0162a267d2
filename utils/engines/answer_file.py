"""Answer the rows of a file with an engine; an interrupted call continues where it stopped."""

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finetune.run_dir import run_of
from model.atomic import owner_only
from model.errors import UserError
from model.wording import counted
from utils.engines.choice import EngineChoice, sha256
from utils.engines.engine import Engine, Reply
from utils.engines.marking import Marker
from utils.engines.prompts import Prompt, count_reasons, read_prompts
from utils.engines.shards import Shard, shard_files
from utils.icd10.answers import Diagnosis, parse_answer
from utils.icd10.confidence import ProbabilityReader
from utils.icd10.mapping import TableMapping
from utils.icd10.predictions import NOTHING_MORE, origin_path, read_origin
from utils.icd10.stays import LeftOut
from utils.tables.csv_cells import CsvWriter
from utils.tables.encodings import AUTO
from utils.tables.jsonl import Row, SkippedRowError, file_errors, read_journal, read_lines, require_own_names, save

CSV_COLUMNS = ("id", "role", "code", "label", "confidence")
DECISION_COLUMNS = ("decision", "reason")  # with --auto
LEFT_OUT_SUFFIX = ".left_out.csv"

# Names of the rules that a coding breaks, given the sex and the age of the patient.
BrokenRules = Callable[[Sequence[Diagnosis], Mapping[str, Any]], list[str]]


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


def answer_file(
    choice: EngineChoice,
    rows: Path,
    out: Path,
    encoding: str = AUTO,
    mapping: TableMapping | None = None,
    with_codes: bool = True,
    shard: Shard | None = None,
    marker: Marker | None = None,
) -> Answered:
    """Answer the rows of a file that are not yet in `out`; rows without a prompt or an answer are listed.

    Answers that shards have left next to `out` are collected first.

    Args:
        choice: the engine and its settings.
        rows: file of notes or conversations.
        out: .jsonl file of the answers, or a .csv file of their codes, written in addition to the .jsonl file.
        encoding: encoding of `rows`, for text formats.
        mapping: columns of `rows`.
        with_codes: whether answers name ICD-10 codes, to be written next to them.
        shard: answer only these rows, into a jsonl file whose name ends with the shard.
        marker: what it knows about the codes is written into the rows; not into those of a shard.

    Raises:
        UserError: the rows, the engine or the output cannot be used.
    """
    if out.suffix not in ((".jsonl", ".csv") if with_codes else (".jsonl",)):
        raise UserError(f"{out}: expected a name that ends in .jsonl{' or .csv' if with_codes else ''}.")
    prompts, left_out = read_prompts(rows, encoding, mapping)
    answers = out.with_suffix(".jsonl")
    if shard:
        prompts, out = shard.of(prompts), shard.path(answers)
        answers = out
    require_own_names({out, answers, origin_path(answers), answers.with_suffix(LEFT_OUT_SUFFIX)}, [rows])
    _require_own_csv(out)
    reader = ProbabilityReader(choice.table, choice.rules) if with_codes else None
    identity = choice.identity() | {"notes": sha256(rows.read_bytes())}
    with file_errors():
        answers.parent.mkdir(parents=True, exist_ok=True)
        if done := read_journal(answers):
            require_same_origin(answers, identity)
        if not shard:
            done |= _collect_shards(answers, done, identity)
        to_do = [prompt for prompt in prompts if prompt.id not in done]
        if to_do:
            engine = choice.open()
            save({origin_path(answers): json.dumps(identity | choice.origin(), ensure_ascii=False, indent=1)})
            print(f"Answering {len(to_do)} of {len(prompts)} rows with {choice.model} ...", file=sys.stderr, flush=True)
            left_out += _write_answers(engine, to_do, answers, reader, choice)
        if marker and not shard:
            _mark(answers, marker)
        if out.suffix == ".csv":
            _save_csv(answers, out)
        save_left_out(left_out, answers.with_suffix(LEFT_OUT_SUFFIX))
    earlier = f" ({len(prompts) - len(to_do)} from an earlier call)" if len(to_do) < len(prompts) else ""
    answered = read_journal(answers).keys() & {prompt.id for prompt in prompts}
    summary = f"{counted(len(answered), 'answer')}{earlier}: {out}"
    return Answered(summary, describe_left_out(left_out, answers), all(row.stay in answered for row in left_out))


def report_answered(answered: Answered) -> None:
    """Print what `answer_file` did.

    Raises:
        UserError: a row has no answer.
    """
    print(answered.summary)
    if answered.warning and answered.complete:
        print(f"warning: {answered.warning}")
    elif answered.warning:
        raise UserError(answered.warning)


def _collect_shards(answers: Path, done: Mapping[str, Row], identity: dict[str, Any]) -> dict[str, Row]:
    """Append the answers of shards that are not in `done` to the journal; return them.

    Raises:
        UserError: a shard has another origin.
    """
    found: dict[str, Row] = {}
    for path in shard_files(answers):
        rows = read_journal(path)
        require_same_origin(path, identity)
        found |= {name: row for name, row in rows.items() if name not in done}
        if not done:
            save({origin_path(answers): origin_path(path).read_text(encoding="utf-8")})
    if found:
        with open(answers, "a", encoding="utf-8", opener=owner_only) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found.values())
    return found


def _write_answers(
    engine: Engine, prompts: Sequence[Prompt], path: Path, reader: ProbabilityReader | None, choice: EngineChoice
) -> list[LeftOut]:
    """Append the answers to a journal as they arrive; return the prompts that got none."""
    left_out = []
    with open(path, "a", encoding="utf-8", opener=owner_only) as file:
        for prompt, row in answered_rows(engine, prompts, reader, choice.broken_rules):
            if isinstance(row, SkippedRowError):
                left_out.append(LeftOut("row", row.reason, prompt.id))
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    return left_out


def answered_rows(
    engine: Engine, prompts: Sequence[Prompt], reader: ProbabilityReader | None, broken_rules: BrokenRules
) -> Iterator[tuple[Prompt, Row | SkippedRowError]]:
    """Yield each prompt with the row of its answer, or why it has none, as soon as it is known; show the progress."""
    with tqdm(total=len(prompts), unit="row", disable=None) as bar:
        for prompt, reply in engine.answers(prompts):
            yield prompt, reply if isinstance(reply, SkippedRowError) else _row(prompt, reply, reader, broken_rules)
            bar.update()


def _row(prompt: Prompt, reply: Reply, reader: ProbabilityReader | None, broken_rules: BrokenRules) -> dict[str, Any]:
    row: dict[str, Any] = {"id": prompt.id, "answer": reply.text}
    if reader:
        found = reader.read(reply.text, reply.pieces, reply.log_probabilities)
        coding = parse_answer(reply.text)
        row["codes"] = [item._asdict() | _probability(chance) for item, chance in zip(coding, found.codes)]
        if broken := broken_rules(coding, prompt.person):
            row["rules"] = broken
        if found.nothing_more is not None:
            row[NOTHING_MORE] = _probability(found.nothing_more)
    if reply.log_probabilities:
        row["log_probability"] = round(sum(reply.log_probabilities), 4)
    return row


def _probability(chance: float | None) -> dict[str, float]:
    return {} if chance is None else {"probability": round(chance, 6)}


def _mark(answers: Path, marker: Marker) -> None:
    """Mark the rows of a journal, and rewrite it and its record if that changes them."""
    rows, origin = read_journal(answers), read_origin(answers)
    marked = {name: marker.mark(row) for name, row in rows.items()}
    record = {key: value for key, value in origin.items() if key != "auto"} | marker.record()
    if marker.was_fitted_to(origin.get("notes")):
        print(
            "warning: the confidences were calibrated on these very stays, and look better than on others.",
            file=sys.stderr,
        )
    if marked != rows or record != origin:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in marked.values()]
        save({answers: "".join(lines), origin_path(answers): json.dumps(record, ensure_ascii=False, indent=1)})


def save_left_out(left_out: Sequence[LeftOut], path: Path) -> None:
    """Write the rows without answer, or remove the file of an earlier call if there are none."""
    if not left_out:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = CsvWriter(text, LeftOut._fields)
    for found in left_out:
        writer.write(*found)
    save({path: text.getvalue()})


def describe_left_out(left_out: Sequence[LeftOut], answers: Path) -> str:
    """Return a sentence on the rows without answer, "" if there are none."""
    if not left_out:
        return ""
    shown = ", ".join(found.stay or found.where for found in left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    listed = answers.with_suffix(LEFT_OUT_SUFFIX)
    unused = counted(len(left_out), "row was", "rows were")
    return f"{unused} not used ({shown}): {count_reasons(left_out)}. See {listed}."


def _save_csv(answers: Path, path: Path) -> None:
    """Write one line per code; a missing value is empty."""
    buffer = io.StringIO()
    rows = [json.loads(line) for _, line in read_lines(answers)]
    decisions = DECISION_COLUMNS if any("decision" in row for row in rows) else ()
    writer = CsvWriter(buffer, (*CSV_COLUMNS, *decisions))
    for row in rows:
        for code in row["codes"]:
            writer.write(row["id"], *map(code.get, CSV_COLUMNS[1:]), *map(row.get, decisions))
    save({path: buffer.getvalue()})


def _require_own_csv(path: Path) -> None:
    """Raise UserError if a csv file exists and does not begin like one of this command."""
    if path.suffix == ".csv" and path.exists():
        with file_errors(), path.open("rb") as file:
            header = file.readline().decode("utf-8", "replace").strip()
            if header and not header.startswith(",".join(CSV_COLUMNS[:4])):
                raise UserError(f"{path} exists and is not an output of this command; choose another file.")


def require_same_origin(answers: Path, identity: dict[str, Any]) -> None:
    """Raise UserError unless the answers in the file have this origin: answers of different origins are not mixed."""
    before = read_origin(answers)
    if different := [key for key in identity if before.get(key) != identity[key]]:
        raise UserError(
            f"{answers} was written with a different {', '.join(different)}; delete it or choose another --out."
        )


def answers_to_gold(choice: EngineChoice, rows: Path, out: Path | None = None, marker: Marker | None = None) -> Path:
    """Answer the rows of a file that is to be scored, unless done before.

    Args:
        choice: the engine and its settings.
        rows: the gold file.
        out: .jsonl file of the answers; None for one in the `predictions` folder of the run.
        marker: what it knows about the codes of the answers is written into the rows; None for answers without codes.

    Returns:
        The file of the answers.

    Raises:
        UserError: `out` is None and the model is not in a run, or the rows cannot be answered.
    """
    answers = out or _predictions_in_run(choice.folder, rows)
    answered = answer_file(choice, rows, answers, marker=marker)
    print(answered.summary, file=sys.stderr)
    if answered.warning:
        print(f"warning: {answered.warning}", file=sys.stderr)
    return answers


def _predictions_in_run(checkpoint: Path | None, rows: Path) -> Path:
    run_dir = run_of(checkpoint) if checkpoint else None
    if checkpoint is None or run_dir is None:
        raise UserError(f"{checkpoint} is neither a run folder (no args.yaml) nor a checkpoint in one.")
    return run_dir / "predictions" / f"{rows.stem}.{checkpoint.resolve().name}.jsonl"
