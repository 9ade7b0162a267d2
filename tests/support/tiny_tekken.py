"""Tekken tokenizers of any version with one token per byte: they load in milliseconds and decode any encoded text."""

import base64
import json
from pathlib import Path

from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokens
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

_WORDS = r"\p{L}+|\p{N}|[^\p{L}\p{N}]"


def write_tiny_tekken(path: Path, version: str) -> Path:
    """Write a tekken.json with 256 byte tokens and all control tokens of mistral-common.

    Args:
        path: the file to write.
        version: "v3", "v7", "v11", "v13" or "v15".

    Returns:
        The path.
    """
    first = [SpecialTokens.unk, SpecialTokens.bos, SpecialTokens.eos]
    control = [token.value for token in first + [token for token in SpecialTokens if token not in first]]
    content = {
        "config": {
            "pattern": _WORDS,
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(control),
            "default_num_special_tokens": len(control),
            "version": version,
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(control)],
    }
    if version == "v15":
        content["model_settings_builder"] = {}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def load_tiny_tekken(folder: Path, version: str) -> MistralTokenizer:
    """Return the tokenizer of `write_tiny_tekken` in mistral-common's finetuning mode."""
    path = write_tiny_tekken(folder / "tekken.json", version)
    return MistralTokenizer.from_file(str(path), mode=ValidationMode.finetuning)
