"""The grammar of messages."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with the words that agree with it: `1 stay has`, `1,200 stays have`.

    Args:
        number: how many.
        one: the words after 1.
        many: the words after any other number; None adds an s to `one`.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
