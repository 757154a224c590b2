"""The one exception whose message is written for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and what to type instead."""
