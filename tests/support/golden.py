"""What mistral-finetune computed: the part of it kept in tests/fixtures/golden, and all of it where it is at hand.

Paths are the same below both folders (see ../shared/golden/README.md), `make_golden_fixtures` copies and condenses.
"""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.tokenize import load_instruct_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"
GOLDEN = _SHARED if _SHARED.is_dir() else None  # the whole of it


def fixture(path: str) -> Path:
    """A file or folder of the committed part."""
    return FIXTURES / path


@functools.cache
def load_json_gz(path: Path) -> Any:
    """One JSON value. It is read once and shared, so do not change it."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


@functools.cache
def load_jsonl_gz(path: Path) -> list[Any]:
    """One JSON value per line. They are read once and shared, so do not change them."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def unfold_mask(runs: list[list[int]]) -> list[bool]:
    """Undoes the run lengths of `mask_rle`: [[0, 2], [1, 1]] -> [False, False, True]."""
    return [bool(value) for value, length in runs for _ in range(length)]


@functools.cache
def instruct_tokenizer(name: str) -> InstructTokenizerBase:
    """The tokenizers golden was made with, "v3" and "tekken": what a model folder without one gets."""
    return load_instruct_tokenizer(fixture("no tokenizer here"), {"v3": 32768, "tekken": 131072}[name])
