"""The `data` block of a training YAML, and the grammar of its sources."""

import dataclasses
import os
import re
from pathlib import Path

from simple_parsing.helpers import Serializable

from model.errors import Problem, UserError

from .packing import PACKINGS
from .shorten import OVERLONG

_LARGEST_WEIGHT = 1e9  # the sum of the weights stays a number


@dataclasses.dataclass
class InstructArgs(Serializable):
    shuffle: bool = True  # each file's rows in a new seeded order at each epoch
    dynamic_chunk_fn_call: bool = True  # rows with tools also train the conversations ending at earlier answers


@dataclasses.dataclass
class DataArgs(Serializable):
    """Sources are written `path[:weight],path[:weight],...`; a path is a jsonl file or a folder of them."""

    data: str = ""  # pretrain sources: every token trains
    shuffle: bool = False  # shuffle pretrain data at each epoch
    instruct_data: str = ""  # conversations: the assistant's messages train
    eval_instruct_data: str = ""  # conversations to evaluate on
    instruct: InstructArgs = dataclasses.field(default_factory=InstructArgs)
    packing: str = "concat"  # concat (the original's: cuts samples) or best_fit (whole samples, some padding)
    overlong: str = "shorten"  # best_fit, samples longer than seq_len: shorten (inside the note), drop or error
    keep_sections: list[str] = dataclasses.field(default_factory=list)  # titles `shorten` touches last, e.g. Conclusion

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; looks at the paths, reads no rows."""
        found = []
        if not self.data.strip() and not self.instruct_data.strip():
            found.append(
                Problem(
                    "data.instruct_data",
                    "`data.instruct_data` and `data.data` are both empty: name at least one training source.",
                )
            )
        parsed: dict[str, list[Source]] = {}
        for key in ("data", "instruct_data", "eval_instruct_data"):
            try:
                parsed[key] = parse_sources(getattr(self, key))
                for source in parsed[key]:
                    source.files()
            except UserError as error:
                found.append(Problem(f"data.{key}", f"`data.{key}`: {error}"))
        if message := _given_as_both(parsed.get("data", []), parsed.get("instruct_data", [])):
            found.append(Problem("data.data", message))
        for key, choices in (("packing", PACKINGS), ("overlong", OVERLONG)):
            if getattr(self, key) not in choices:
                found.append(
                    Problem(f"data.{key}", f"`data.{key}` is {getattr(self, key)!r}; expected {', '.join(choices)}.")
                )
        if self.instruct.dynamic_chunk_fn_call and not self.instruct.shuffle:
            found.append(
                Problem(
                    "data.instruct.dynamic_chunk_fn_call",
                    "`data.instruct.dynamic_chunk_fn_call` needs `data.instruct.shuffle: true`, since the shorter "
                    "conversations stand behind all others in a file; set both to true or both to false.",
                )
            )
        return found


@dataclasses.dataclass(frozen=True)
class Source:
    """One jsonl file or one folder of them."""

    path: Path
    weight: float = 1.0

    def files(self) -> list[Path]:
        """The jsonl files of this source, in sorted order for a folder (searched with its sub-folders).

        Raises:
            UserError: there is no such file or folder, or the folder holds no file whose name ends in "jsonl".
        """
        if os.path.isfile(self.path):
            return [self.path]
        if not os.path.isdir(self.path):
            found = "is a pipe, a device or a socket" if os.path.exists(self.path) else "does not exist"
            raise UserError(f"The path {self.path} {found}; expected a jsonl file or a folder of jsonl files.")
        files = sorted(path for path in self.path.rglob("*jsonl") if path.is_file())
        if not files:
            raise UserError(f"The folder {self.path} holds no file whose name ends in 'jsonl'.")
        return files


def parse_sources(text: str) -> list[Source]:
    """Reads `path[:weight],path[:weight],...`; blanks around paths, weights and commas do not count.

    Raises:
        UserError: a malformed source, a weight that is no positive number, or a path that stands twice.
    """
    sources: list[Source] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        path, weight = _split_weight(entry)
        if any(source.path == Path(path) for source in sources):
            raise UserError(f"{path} stands twice in {text!r}; give it once, with the sum of its weights.")
        sources.append(Source(Path(path), weight))
    return sources


def _split_weight(entry: str) -> tuple[str, float]:
    # A drive letter (E:/notes.jsonl) is part of the path, not a source of its own.
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
        raise UserError(f"{malformed}, but {weight_text.strip()!r} is no number.") from None
    if not 0 < weight < float("inf"):
        raise UserError(f"{malformed}, but the weight is {weight_text.strip()}: it must be positive.")
    if weight > _LARGEST_WEIGHT:
        raise UserError(f"{malformed}, but the weight is {weight_text.strip()}: at most {_LARGEST_WEIGHT:g} will do.")
    return path, weight


def training_sources(args: DataArgs) -> tuple[list[Source], list[Source]]:
    """The pretrain and the instruct sources.

    Raises:
        UserError: a source is malformed, or stands both under `data` and `instruct_data`.
    """
    pretrain, instruct = parse_sources(args.data), parse_sources(args.instruct_data)
    if message := _given_as_both(pretrain, instruct):
        raise UserError(message)
    return pretrain, instruct


def _given_as_both(pretrain: list[Source], instruct: list[Source]) -> str | None:
    both = {source.path for source in pretrain} & {source.path for source in instruct}
    if not both:
        return None
    names = ", ".join(sorted(map(str, both)))
    return f"{names} is listed under both `data.data` and `data.instruct_data`; its rows are one or the other."
