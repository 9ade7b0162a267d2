"""Integrity of a saved folder: a manifest with the size and SHA-256 of every file."""

import hashlib
import json
import os
from pathlib import Path

from model.errors import UserError

from .run_dir import WEIGHTS_NAME

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` into `folder`: the size in bytes and the SHA-256 of each file."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def find_corruption(folder: Path, hashes: bool = True, part: str = "") -> str | None:
    """Compare a folder with its manifest.

    Args:
        folder: a folder that `write_manifest` completed.
        hashes: compare hashes too, which reads every file; otherwise only sizes.
        part: compare only files whose path begins with this.

    Returns:
        The first difference, or None if there is none.
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not name.startswith(part):
                continue
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST_NAME} names a file outside the folder"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if hashes and _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written (SHA-256)"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_NAME} cannot be read"
    return None


def require_intact(weights: Path) -> None:
    """Compare the weights of a checkpoint, by the name of their folder or of a file in it, with its manifest.

    Weights that are not in a checkpoint with a manifest are not compared.

    Raises:
        UserError: a file has changed since it was written.
    """
    folder = Path(os.path.abspath(weights if weights.is_dir() else weights.parent))
    checkpoint = folder.parent
    if folder.name != WEIGHTS_NAME or not (checkpoint / MANIFEST_NAME).is_file():
        return
    if fault := find_corruption(checkpoint, part=f"{WEIGHTS_NAME}/"):
        raise UserError(f"The checkpoint {checkpoint} is corrupt: {fault}. Use another one, or copy it again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
