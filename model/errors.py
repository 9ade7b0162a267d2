"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was found, what was expected and what to do.

    Entry points print the message and exit with code 1; anything else is a defect of ours and keeps its traceback.
    """
