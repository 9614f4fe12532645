"""The one exception that the user can fix."""


class UserError(Exception):
    """A mistake in what was asked for: one line saying what came, what is valid and what to do.

    The scripts print the line without a traceback and exit with code 2.
    """
