"""The documentation: its pages, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

_BLOCKS = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("python", "torchrun", "make", "pip", "source", "sbatch", "hf", "mistral-chat", "vllm", "ollama")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return [code for kind, code in _BLOCKS.findall(text) if kind == language]


def commands(text: str) -> list[str]:
    """Return the shell commands in code blocks, and those in sentences and tables."""
    lines = [
        shlex.join(shlex.split(line, comments=True)) for block in blocks(text, "sh") for line in block.splitlines()
    ]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", _BLOCKS.sub("", text))
    found = [shlex.join(shlex.split(span)) for span in spans if span.split()[0] in _PROGRAMS and " " in span]
    return list(dict.fromkeys(filter(None, lines + found)))


COMMANDS = commands(TEXT)


def starts_with(command: str, beginning: str) -> bool:
    """Return whether a command begins with these words."""
    return re.match(rf"{re.escape(beginning)}(?!\w)", command) is not None


def command_starting_with(beginning: str) -> str:
    """Return the command of the documentation that is these words, or the only one that begins with them."""
    if beginning in COMMANDS:
        return beginning
    (found,) = (command for command in COMMANDS if starts_with(command, beginning))
    return found
