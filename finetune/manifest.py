"""What a finished folder holds, so that a reader can tell it from a damaged one."""

import hashlib
import json
import os
from pathlib import Path

MANIFEST_NAME = "manifest.json"
_BLOCK = 1 << 20


def seal(folder: Path) -> None:
    """Has every file of `folder` reach the disk and writes `manifest.json`: size and sha256 of each."""
    facts = {}
    for path in _files(folder):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        facts[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump({"files": facts}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Has the folder's entries, and so renames in it, reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path, hashes: bool = True) -> str | None:
    """Says what is wrong with a sealed folder; None where all is as it was written.

    Args:
        folder: what `seal` sealed.
        hashes: compare contents too, which reads everything; else sizes alone.
    """
    try:
        facts = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        for name, fact in facts.items():
            path = folder / name
            if path.stat().st_size != fact["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {fact['bytes']:,}"
            if hashes and _sha256(path) != fact["sha256"]:
                return f"{name} is not what was written (sha256)"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
