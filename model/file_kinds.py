"""Recognize files of the wrong type by their first bytes."""

_SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a zstandard archive",
    b"PAR1": "a parquet table",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"version https://git-lfs": "a git-lfs pointer (run `git lfs pull`)",
}
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")


def looks_like(beginning: bytes) -> str | None:
    """Return the type of a file with this beginning, such as "a zip archive", or None if it is not recognized."""
    for signature, kind in _SIGNATURES.items():
        if beginning.startswith(signature):
            return kind
    if beginning[:200].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_MARKUP):
        return "a web page (HTML or XML)"
    return None
