"""The `data` block of the training YAML, and the syntax of its sources."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from model.errors import Problem, UserError
from model.settings import Bool, Settings, Str, expand_path

_LARGEST_WEIGHT = 1e9  # so that the sum of the weights stays finite


def _expand_sources(text: str) -> str:
    return ",".join(_expand_source(entry) for entry in text.split(","))


def _expand_source(entry: str) -> str:
    try:
        path, _ = _split_weight(entry.strip())
    except UserError:  # reported by DataArgs.problems
        return entry
    return entry.replace(path, expand_path(path), 1)


Sources = Annotated[Str, AfterValidator(_expand_sources)]


@dataclasses.dataclass
class InstructArgs(Settings):
    """How conversations are read."""

    shuffle: Bool = True  # read each file's rows in a new seeded order in each epoch
    # a row with tools also yields the conversations that end at its earlier answers
    dynamic_chunk_fn_call: Bool = True


@dataclasses.dataclass
class DataArgs(Settings):
    """Training and evaluation data.

    Sources are written `path[:weight],path[:weight],...`; a path is a jsonl file or a folder that is searched for them.
    """

    data: Sources = ""  # pretraining sources: every token is trained
    shuffle: Bool = False  # shuffle the pretraining data in each epoch
    instruct_data: Sources = ""  # conversations: the assistant's messages are trained
    eval_instruct_data: Sources = ""  # conversations to evaluate on
    instruct: InstructArgs = dataclasses.field(default_factory=InstructArgs)
    # how samples fill sequences. `concat`: one after the other, split at sequence boundaries, as in mistral-finetune;
    # `best_fit`: whole samples, with some padding
    packing: Literal["concat", "best_fit"] = "concat"
    # what `best_fit` does with a sample longer than `seq_len`. `shorten`: remove text inside the note; `drop`: leave
    # the sample out; `error`: refuse to train
    overlong: Literal["shorten", "drop", "error"] = "shorten"
    # titles of sections that `shorten` removes last, for example Conclusion
    keep_sections: list[Str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[Problem]:
        found = []
        if not self.data.strip() and not self.instruct_data.strip():
            message = "`data.instruct_data` and `data.data` are both empty: name at least one training source."
            found.append(Problem("data.instruct_data", message))
        parsed: dict[str, list[Source]] = {}
        for key in ("data", "instruct_data", "eval_instruct_data"):
            try:
                parsed[key] = parse_sources(getattr(self, key))
                for source in parsed[key]:
                    source.files()
            except UserError as error:
                found.append(Problem(f"data.{key}", f"`data.{key}`: {error}"))
        if listed_twice := _in_both(parsed.get("data", []), parsed.get("instruct_data", [])):
            found.append(Problem("data.data", listed_twice))
        if self.instruct.dynamic_chunk_fn_call and not self.instruct.shuffle:
            message = (
                "`data.instruct.dynamic_chunk_fn_call` needs `data.instruct.shuffle: true`, because the truncated "
                "conversations are appended to the end of each file; set both to true or both to false."
            )
            found.append(Problem("data.instruct.dynamic_chunk_fn_call", message))
        return found


@dataclasses.dataclass(frozen=True)
class Source:
    """One jsonl file or one folder of them."""

    path: Path
    weight: float = 1.0

    def files(self) -> list[Path]:
        """Return the jsonl files of this source; of a folder, those in it and in its subfolders, sorted by path.

        Raises:
            UserError: the path is neither a file nor a folder, or the folder has no file whose name ends in "jsonl".
        """
        if os.path.isfile(self.path):
            return [self.path]
        if not os.path.isdir(self.path):
            found = "is a pipe, a device or a socket" if os.path.exists(self.path) else "does not exist"
            raise UserError(f"The path {self.path} {found}; expected a jsonl file or a folder of jsonl files.")
        files = sorted(path for path in self.path.rglob("*jsonl") if path.is_file())
        if not files:
            raise UserError(f"The folder {self.path} contains no file whose name ends in 'jsonl'.")
        return files


def parse_sources(text: str) -> list[Source]:
    """Parse `path[:weight],path[:weight],...`; spaces around paths, weights and commas are ignored.

    Raises:
        UserError: a malformed source, a weight that is not a positive number, or a path that is listed twice.
    """
    sources: list[Source] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        path, weight = _split_weight(entry)
        if any(source.path == Path(path) for source in sources):
            raise UserError(f"{path} is listed twice in {text!r}; give it once, with the sum of its weights.")
        sources.append(Source(Path(path), weight))
    return sources


def _split_weight(entry: str) -> tuple[str, float]:
    # The colon of a drive letter (E:/notes.jsonl) is part of the path.
    drive = re.match(r"[A-Za-z]:[\\/]", entry)
    path, colon, weight_text = entry[drive.end() if drive else 0 :].partition(":")
    path = (drive.group() if drive else "") + path.strip()
    malformed = f"{entry!r} is not a data source; expected <path> or <path>:<weight>"
    if not path or ":" in weight_text or (colon and not weight_text.strip()):
        raise UserError(f"{malformed} with at most one colon.")
    if not colon:
        return path, 1.0
    try:
        weight = float(weight_text)
    except ValueError:
        raise UserError(f"{malformed}, but {weight_text.strip()!r} is not a number.") from None
    if not 0 < weight < float("inf"):
        raise UserError(f"{malformed}, but the weight is {weight_text.strip()}: it must be positive.")
    if weight > _LARGEST_WEIGHT:
        raise UserError(f"{malformed}, but the weight is {weight_text.strip()}: expected at most {_LARGEST_WEIGHT:g}.")
    return path, weight


def training_sources(args: DataArgs) -> tuple[list[Source], list[Source]]:
    """Return the pretraining and the instruct sources.

    Raises:
        UserError: a source is malformed, or listed under both `data` and `instruct_data`.
    """
    pretrain, instruct = parse_sources(args.data), parse_sources(args.instruct_data)
    if message := _in_both(pretrain, instruct):
        raise UserError(message)
    return pretrain, instruct


def _in_both(pretrain: list[Source], instruct: list[Source]) -> str | None:
    both = {source.path for source in pretrain} & {source.path for source in instruct}
    if not both:
        return None
    names = ", ".join(sorted(map(str, both)))
    return f"{names} is listed under both `data.data` and `data.instruct_data`; its rows are one or the other."
