"""The one exception that the user can fix, and what others say."""


class UserError(Exception):
    """A mistake in what was asked for: one line saying what came, what is valid and what to do.

    The scripts print the line without a traceback and exit with code 2.
    """


def message_of(error: BaseException, silent: str = "") -> str:
    """The first line of what an error says. silent: in its place where it says nothing."""
    return (str(error).strip().splitlines() or [silent])[0]
