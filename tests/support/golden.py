"""Reference outputs of mistral-finetune: a committed part in tests/fixtures/golden, and all of them if available.

Paths are the same in both folders (see ../shared/golden/README.md); `make_golden_fixtures` copies and condenses them.
"""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.tokenizer_files import load_instruct_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"

_SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"
GOLDEN = _SHARED if _SHARED.is_dir() else None  # all reference outputs


def fixture(path: str) -> Path:
    """Return the path of a committed file or folder."""
    return FIXTURES / path


@functools.cache
def load_json_gz(path: Path) -> Any:
    """Return the JSON value of a file; it is cached, so do not modify it."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


@functools.cache
def load_jsonl_gz(path: Path) -> list[Any]:
    """Return one JSON value per line; they are cached, so do not modify them."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def unfold_mask(runs: list[list[int]]) -> list[bool]:
    """Decode the run lengths of `mask_rle`: [[0, 2], [1, 1]] -> [False, False, True]."""
    return [bool(value) for value, length in runs for _ in range(length)]


@functools.cache
def instruct_tokenizer(name: str) -> InstructTokenizerBase:
    """Return the tokenizer "v3" or "tekken" of the reference outputs, the defaults for a model folder without one."""
    return load_instruct_tokenizer(fixture("no tokenizer here"), {"v3": 32768, "tekken": 131072}[name])
