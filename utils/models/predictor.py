"""Answer the rows of a file with a trained model; an interrupted call continues where it stopped."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
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
from utils.icd10.answers import parse_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.predictions import origin_path, read_origin
from utils.icd10.prompts import prompt_messages
from utils.tables.csv_cells import CsvWriter
from utils.tables.jsonl import file_errors, read_journal, read_lines, require_own_names, save
from utils.tables.read_table import read_table

ID_COLUMNS = ("id", "visit_occurence_id")
CSV_COLUMNS = ("id", "role", "code", "label")


class Prompt(NamedTuple):
    """A row without its answer."""

    id: str
    row: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.row["messages"]


def read_prompts(path: Path, encoding: str = "utf-8") -> list[Prompt]:
    """Return the prompt of each row: the note in `text`, or the `messages` before the last answer.

    Raises:
        UserError: a row has neither `messages` nor `text`, or an id appears twice.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, row in read_table(path, encoding):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: {row}.")
        row_id = str(next((row[key] for key in ID_COLUMNS if row.get(key) not in (None, "")), number))
        if row_id in seen:
            raise UserError(f"{path}, row {number}: duplicate id {row_id}; each row needs its own.")
        seen.add(row_id)
        prompts.append(Prompt(row_id, _question(row, f"{path}, row {number}")))
    if not prompts:
        raise UserError(f"{path} has no rows; expected a note or a question per row.")
    return prompts


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(row.get("text"), str) and row["text"].strip():
        return {"messages": prompt_messages(row["text"])}
    if not isinstance(row.get("messages"), list) or not row["messages"]:
        raise UserError(f"{where} has neither `text` nor `messages`; expected a note or a conversation.")
    messages = row["messages"]
    try:
        parsed = parse_conversation(row).messages
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
    question = messages[:-1] if parsed[-1].role == "assistant" else messages
    if not question:
        raise UserError(f"{where} has an answer but no question.")
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


def predict_file(
    folder: Path,
    rows: Path,
    out: Path,
    table: Cim10Table | None = None,
    step: int | str | None = None,
    batch_size: int = 16,
    max_tokens: int = 512,
    encoding: str = "utf-8",
) -> str:
    """Answer the rows of a file that are not yet in `out`, and return a summary.

    Args:
        folder: folder of a run, a checkpoint or a model.
        rows: file of notes or conversations.
        out: .jsonl file of the answers, or a .csv file of their codes, written in addition to the .jsonl file.
        table: codes that answers may contain; None for unconstrained answers.
        step: checkpoint of a run: a step number or "best"; None for the latest.
        batch_size: rows per batch.
        max_tokens: maximum length of an answer.
        encoding: encoding of `rows`, for text formats.

    Raises:
        UserError: the rows, the run or the output cannot be used.
    """
    if out.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{out}: expected a name that ends in .jsonl or .csv.")
    prompts = read_prompts(rows, encoding)
    answers = out.with_suffix(".jsonl")
    require_own_names({out, answers, origin_path(answers)}, [rows])
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
        done = read_journal(answers)
        if done:
            _require_same_origin(answers, identity)
        to_do = [prompt for prompt in prompts if prompt.id not in done]
        if to_do:
            save({origin_path(answers): json.dumps(identity | {"checkpoint": str(checkpoint)}, indent=1)})
            print(f"Answering {len(to_do)} of {len(prompts)} rows with {checkpoint} ...", file=sys.stderr, flush=True)
            predictor = Predictor(checkpoint, table)
            with open(answers, "a", encoding="utf-8", opener=owner_only) as file:
                for prediction in _predictions(predictor, to_do, batch_size, max_tokens):
                    file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
                    file.flush()
        if out.suffix == ".csv":
            _save_csv(answers, out)
    earlier = f" ({len(prompts) - len(to_do)} from an earlier call)" if len(to_do) < len(prompts) else ""
    return f"{len(prompts)} answers{earlier}: {out}"


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
    buffer = StringIO()
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
    print(predict_file(checkpoint, rows, answers), file=sys.stderr)
    return answers
