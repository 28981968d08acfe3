"""The one exception that means "the user's input is at fault"."""


class InputError(Exception):
    """Bad input from outside: the message is one line that says what is wrong and where.

    The command line prints it to stderr and exits with status 2; it is never a traceback.
    """
