"""The one error class for what a user can mend."""


class UserError(Exception):
    """Something the user can mend: the message names the rule, the value, the place and the remedy.

    The command line shows only its message (exit code 1); any other exception is our defect and keeps its traceback.
    """
