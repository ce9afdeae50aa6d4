"""The one exception that means: the input, not the program, is at fault."""

from __future__ import annotations


class InputError(ValueError):
    """Something a person gave is wrong: one sentence that says what, where and what to do.

    The command line prints the sentence without a traceback and exits with code 1; library users
    catch it as a :class:`ValueError`.

    Example:
        >>> raise InputError("case 'a7': the label holds value 7; map it in the layout's codes.")
        Traceback (most recent call last):
        ...
        pmixseg.errors.InputError: case 'a7': the label holds value 7; map it in the layout's codes.
    """
