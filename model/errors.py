"""The one exception that means "the user can mend this", and how its messages quote what was found."""

from typing import NamedTuple

_LONGEST_QUOTE = 500  # characters


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was found, what was expected and what to do.

    Entry points print the message and exit with code 1; anything else is a defect of ours and keeps its traceback.
    """


class Problem(NamedTuple):
    """A setting that cannot be used."""

    key: str  # dotted path of the YAML key, such as lora.rank
    message: str  # one sentence: the value found, what was expected, the remedy

    def is_about(self, *keys: str) -> bool:
        """Return whether the problem concerns one of `keys`, or a key of one of these blocks."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


def quoted(value: object) -> str:
    """`repr(value)` for a message: cut where it is long, and of values that Python refuses to print too."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of over 4,300 digits; an endless nesting
        return f"{type(value).__name__} too long to show"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]} ..."


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
