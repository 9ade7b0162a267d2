"""The exception for mistakes that the user can fix, and how messages quote values."""

import errno
from typing import Literal, NamedTuple

_LONGEST_QUOTE = 500  # characters
# Parts of messages about memory whose exceptions have no type of their own: of PyTorch's allocators, of mmap, of
# threads without memory for a stack, of libraries that are imported late.
_GPU_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_IS_FULL = (
    *("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory", "can't start new thread"),
    "failed to map segment from shared object",
)


class UserError(ValueError):
    """A mistake in the user's input. The message contains the value found, what was expected and how to fix it.

    Entry points print the message and exit with code 1. Any other exception is a bug and keeps its traceback.
    """


class Problem(NamedTuple):
    """A setting that cannot be used."""

    key: str  # dotted path of the YAML key, such as lora.rank
    message: str  # one sentence: the value found, what was expected, the remedy

    def is_about(self, *keys: str) -> bool:
        """Return whether the problem concerns one of `keys`, or a key of one of these blocks."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


def quoted(value: object) -> str:
    """Return `repr(value)` for a message: truncated if long, and defined even if `repr` fails."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of over 4,300 digits; deep nesting
        return f"{type(value).__name__} too long to show"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]} ..."


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def full_memory(error: BaseException) -> Literal["gpu", "host"] | None:
    """Return which memory was too small, if that is what an exception means."""
    if isinstance(error, UserError):
        return None
    # By its name, since this module does not import torch.
    if type(error).__name__ == "OutOfMemoryError" or any(part in str(error) for part in _GPU_IS_FULL):
        return "gpu"
    host = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "host" if host or any(part in str(error) for part in _HOST_IS_FULL) else None
