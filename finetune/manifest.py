"""Integrity of a saved folder: a manifest with the size and SHA-256 of every file."""

import hashlib
import json
from pathlib import Path

MANIFEST_NAME = "manifest.json"
_BLOCK = 1 << 20


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` into `folder`: the size in bytes and the SHA-256 of each file."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def find_corruption(folder: Path, hashes: bool = True) -> str | None:
    """Compare a folder with its manifest.

    Args:
        folder: a folder that `write_manifest` completed.
        hashes: compare hashes too, which reads every file; otherwise only sizes.

    Returns:
        The first difference, or None if there is none.
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if hashes and _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written (SHA-256)"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
