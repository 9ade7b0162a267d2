"""Every setting of the training YAML, for `python -m train --help`."""

import dataclasses
import shutil
import textwrap
from typing import Any

from .args import known_settings
from .yaml_file import as_yaml


def train_help(description: str) -> str:
    """Return what `python -m train --help` prints."""
    usage = "usage: python -m train [CONFIG.yaml] [KEY=VALUE ...] [--train_yaml CONFIG.yaml]"
    return f"{usage}\n\n{description}\n{settings_help(shutil.get_terminal_size().columns - 2)}"


def settings_help(width: int) -> str:
    """Return every key with its default, its values and its meaning; lines have at most `width` characters."""
    sections = {"": ["settings, with their defaults:"]}  # by block, the keys outside of blocks first
    for key, setting in known_settings().items():
        meaning = setting.description.splitlines()[0].removesuffix(".")
        if setting.is_block:
            sections[key] = [f"{key}: {meaning}"]
            continue
        about = textwrap.wrap(f"{meaning} ({setting.expected})", width - 6)
        lines = [f"  {key}: {default_as_yaml(setting.default)}", *(f"      {line}" for line in about)]
        sections[key.rpartition(".")[0]] += lines
    return "\n\n".join("\n".join(lines) for lines in sections.values())


def default_as_yaml(default: Any) -> str:
    """Return the default of a setting as it is written in a YAML file; empty for a block, which is made of others."""
    if default is dataclasses.MISSING:
        return "required"
    return "" if callable(default) else as_yaml(default)
