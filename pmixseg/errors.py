"""The one exception that means: the input, not the program, is at fault."""

from __future__ import annotations


class InputError(ValueError):
    """Something a person gave is wrong: one sentence that says what, where and what to do.

    The command line prints the sentence without a traceback and exits with code 1; library users
    catch it as a :class:`ValueError`.

    PyTorch makes what a worker of a ``DataLoader`` raised anew from the text of its traceback. The
    sentence is then taken out of it, and the rest becomes a note below it.

    Example:
        >>> raise InputError("case 'a7': the label holds value 7; map it in the layout's codes.")
        Traceback (most recent call last):
        ...
        pmixseg.errors.InputError: case 'a7': the label holds value 7; map it in the layout's codes.
    """

    def __init__(self, *args: object) -> None:
        told = str(args[0]) if args else ""
        _, marker, sentence = told.rpartition(f"\n{__name__}.{type(self).__name__}: ")
        if marker and "\nOriginal Traceback (most recent call last):\n" in told:
            super().__init__(sentence.strip(), *args[1:])
            self.add_note(told)
        else:
            super().__init__(*args)
