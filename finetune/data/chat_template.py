"""Compare the chat layout that Hugging Face's files of a model folder describe with Mistral's, which is trained.

Rows are encoded by mistral-common; no template is ever executed. A template is recognized by its control tokens.
"""

import json
import re
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.base import Tokenizer, TokenizerVersion

_CONFIG_NAME = "tokenizer_config.json"
_TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json", _CONFIG_NAME)  # in transformers' order of preference
_EOS = "</s>"  # in all of Mistral's tokenizers
_SYSTEM = "[SYSTEM_PROMPT]"  # a control token from v7 on; before, the system prompt is part of a user message
_SYSTEM_VERSION = 7
# Control tokens of other layouts: <|im_start|>, <|eot_id|>, <|user|>, <<SYS>>, <start_of_turn> ...
_FOREIGN = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|<</?SYS>>|<(?:start|end)_of_turn>")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_MOST_NAMED = 4
_MOST_PADDING = 256  # rows that a vocabulary may have beyond its tokenizer, to be a multiple of a round number


def layout_of(version: TokenizerVersion) -> str:
    """Return a layout in words, such as "Mistral's v3 layout ([INST] ... [/INST] ...</s>)"."""
    system = f"{_SYSTEM} ... [/SYSTEM_PROMPT] " if version.version_num >= _SYSTEM_VERSION else ""
    return f"Mistral's {version.value} layout ({system}[INST] ... [/INST] ...{_EOS})"


def layout_differences(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Return how the chat layout and the tokens of a model folder differ from those of its tokenizer, in words."""
    config = _read_object(folder / _CONFIG_NAME)
    found = _template_differences(folder, config, tokenizer.version)
    eos = _eos(folder, config)
    if eos is None and (ids := _eos_ids(folder)) and tokenizer.eos_id not in ids:
        eos = f"number {ids[0]}"
    if eos not in (None, _EOS):
        found.append(f"its end-of-sequence token is {_shown([str(eos)])}")
    return found + _token_differences(_added_tokens(folder, config), tokenizer, vocab_size)


def _template_differences(folder: Path, config: dict[str, Any], version: TokenizerVersion) -> list[str]:
    file, template = _chat_template(folder, config)
    if not template:
        return []
    template = _COMMENT.sub("", template)
    foreign = sorted(set(_FOREIGN.findall(template)))
    if "[INST]" not in template:
        instead = f" but {_shown(foreign)}" if foreign else ""
        return [f"its chat template ({file}) does not use [INST]{instead}"]
    if foreign:
        return [f"its chat template ({file}) uses {_shown(foreign)}"]
    if (_SYSTEM in template) != (version.version_num >= _SYSTEM_VERSION):
        uses = "uses" if _SYSTEM in template else "does not use"
        return [f"its chat template ({file}) {uses} {_SYSTEM}"]
    return []


def _chat_template(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Return the default chat template and the name of its file; empty if there is none."""
    for name in _TEMPLATE_NAMES:
        if name.endswith(".jinja"):
            template: Any = _read_text(folder / name)
        else:
            content = config if name == _CONFIG_NAME else _read_object(folder / name)
            template = content.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template.strip():
            return name, template
    return "", ""


def _eos(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the end-of-sequence token that Hugging Face's files name, or None."""
    for source in (config, _read_object(folder / "special_tokens_map.json")):
        token = source.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _eos_ids(folder: Path) -> list[int]:
    """Return the numbers of the end-of-sequence tokens that Hugging Face's files give, or an empty list."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_object(folder / name).get("eos_token_id")
        if ids := [id for id in _list(ids) or [ids] if type(id) is int]:
            return ids
    return []


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, str]:
    """Return the tokens that were added to the vocabulary, by number, with those that every vocabulary has."""
    pairs: list[tuple[Any, Any]] = [(id, token) for token, id in _read_object(folder / "added_tokens.json").items()]
    decoder = config.get("added_tokens_decoder")
    for id, entry in decoder.items() if isinstance(decoder, dict) else ():
        pairs.append((int(id) if id.isdecimal() else None, entry))
    if not pairs:  # tokenizer.json is large, and repeats them
        entries = _read_object(folder / "tokenizer.json").get("added_tokens")
        pairs = [(entry.get("id"), entry) for entry in _list(entries) if isinstance(entry, dict)]
    named = [(id, entry.get("content") if isinstance(entry, dict) else entry) for id, entry in pairs]
    return {id: token for id, token in named if type(id) is int and id >= 0 and isinstance(token, str)}


def _token_differences(added: dict[int, str], tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    found = []
    size = tokenizer.n_words
    missing = [token for id, token in sorted(added.items()) if id >= size]
    if missing or vocab_size - size > _MOST_PADDING:
        file = Path(str(tokenizer.file_path)).name
        among = f", among them {_shown(missing)}" if missing else ""
        found.append(f"{vocab_size - size:,} of the model's {vocab_size:,} tokens have no piece in {file}{among}")
    renamed = [
        token
        for id, token in sorted(added.items())
        if id < size and _FOREIGN.fullmatch(token) and tokenizer.id_to_piece(id) != token
    ]
    if renamed:
        found.append(f"it gives tokens the names {_shown(renamed)}")
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shown(tokens: list[str]) -> str:
    more = ", ..." if len(tokens) > _MOST_NAMED else ""
    return ", ".join(token[:40] for token in tokens[:_MOST_NAMED]) + more


def _read_text(path: Path) -> str:
    """Return a file's text, or an empty string if it cannot be read: what it describes is not used anyway."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
