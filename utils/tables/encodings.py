"""Decide in which encoding a text file is written."""

import codecs
import re
from pathlib import Path

from model.errors import UserError

AUTO = "auto"

_CHUNK = 1 << 20  # bytes read at once
# Bytes of a UTF-8 sequence for a letter with an accent, a typographic quote or a dash. In a file that is not UTF-8 they
# come from rows that are: no French word in cp1252 has "Ã©" or "â€™".
_UTF8_SEQUENCE = re.compile(rb"\xc3[\x80-\xbf]|\xc2[\xa0-\xbf]|\xe2\x80[\x90-\xbf]")
_CANDIDATES = ("cp1252", "cp850", "mac_roman", "latin-1")  # of French exports, the most common first
_FRENCH = frozenset("àâæçéèêëîïôœùûüÿÀÂÇÉÈÊËÎÏÔŒÙÛ°«»’–…€µ\xa0")


def encoding_of(path: Path, wished: str) -> str:
    """Return the encoding to read a file in: the wished one, unless that is "auto" or the file is valid UTF-8.

    A file in a one-byte encoding is never valid UTF-8 where it has accents, and one option holds for several files.
    """
    one_byte = len("é".encode(wished, "replace")) == 1 if wished != AUTO else False
    return detect_encoding(path) if wished == AUTO or (one_byte and _is_utf8(path)) else wished


def detect_encoding(path: Path) -> str:
    """Return the encoding of a text file: UTF-8 or UTF-16 where its bytes are, otherwise a one-byte encoding.

    Raises:
        UserError: the file mixes UTF-8 and another encoding.
    """
    with path.open("rb") as file:
        beginning = file.read(4096)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if beginning[1::2].count(0) > len(beginning) / 4:
        return "utf-16-le"
    return "utf-8-sig" if _is_utf8(path) else _one_byte_encoding(path)


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _one_byte_encoding(path: Path) -> str:
    """Return the candidate that makes the most of the file's bytes French characters."""
    high: dict[int, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            if _UTF8_SEQUENCE.search(line):
                raise UserError(
                    f"{path} mixes UTF-8 (as in line {number}) and another encoding. Save it again in one encoding, or "
                    "give --encoding cp1252 to read it as it is."
                )
            for byte in line:
                if byte >= 0x80:
                    high[byte] = high.get(byte, 0) + 1

    def french(encoding: str) -> int:
        return sum(count for byte, count in high.items() if bytes([byte]).decode(encoding, "replace") in _FRENCH)

    return max(_CANDIDATES, key=french)
