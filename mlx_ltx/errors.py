"""The one exception for what a user can put right."""


class UserError(Exception):
    """A mistake in the request, a file or the machine that the user can put right.

    The message is one line that names the thing, what is wrong with it and what would be right.
    The command line prints it on stderr and exits with 1; a host app can show it as it stands.
    """
