"""The exception for a mistake in the input: one sentence with what, where and what to do.

And the words of such sentences: what a disk or a memory says, and counts.
"""

from __future__ import annotations

import errno
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from textwrap import shorten
from traceback import walk_tb

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""What a disk answers to a write; Python then often does not know the file."""

_PLACE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EBUSY),
}
"""What is wrong with a path; without a file name it is about something else."""

_SHARED = re.compile(
    r"DataLoader worker .*(killed by signal|exited unexpectedly)|shared memory|file </torch_|"
    r"received \d+ items of ancdata",
    re.DOTALL,
)
"""What PyTorch says where the system ended a process that reads data, or refused it a buffer."""

_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory|failed to map segment")
"""What PyTorch, Python and the loader of libraries say where memory is used up."""

_THREADS = re.compile(r"start new thread|join thread before it is started")
"""What Python says where the system starts no more threads, and while it clears up after that."""

_TORCH = re.compile(r"PytorchStreamWriter|inline_container\S* \. unexpected pos|iostream error")
"""What PyTorch says where it could not write all of a file."""


_LOOP = re.compile(r"Symlink loop from '(.*)'")
"""What Python before 3.13 says of a link that leads back to itself."""


_TRAINER = "lightning.pytorch.trainer.trainer"
_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_RESTORING = ("lightning", "torch", "packaging", "pmixseg")
"""Where the state of a training is restored, by whom, and with whose help."""

_USING_STATE = (
    *("lightning.pytorch.", "torch.optim.", "torch.utils._foreach_utils"),
    "pmixseg.modules.training.resuming",
)
"""Modules that use what was restored."""


class InputError(ValueError):
    """Report what is wrong with an input: one sentence with what, where and what to do.

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
        message = str(args[0]) if args else ""
        _, marker, sentence = message.rpartition(f"\n{__name__}.{type(self).__name__}: ")
        if marker and "\nOriginal Traceback (most recent call last):\n" in message:
            super().__init__(sentence.strip(), *args[1:])
            self.add_note(message)
        else:
            super().__init__(*args)


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Say how many there are of something; several are by default ``one`` with an ``s``.

    Example:
        >>> count_of(1, "case"), count_of(2000, "case"), count_of(0, "case has", "cases have")
        ('1 case', '2,000 cases', '0 cases have')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


@contextmanager
def explained(what: str, advice: str, *faults: type[Exception]) -> Iterator[None]:
    """Turn faults of a block into one sentence: ``what``, the fault in brackets, and ``advice``.

    An :class:`InputError` passes as it is. Where no ``faults`` are named it is any other: what a
    library raises on a damaged file is no part of its promises, and changes with its version.
    """
    explicable = faults or (Exception,)
    try:
        yield
    except InputError:
        raise
    except explicable as fault:
        # What a disk says without the path; YAML's words in one line.
        said = getattr(fault, "strerror", None) or " ".join(str(fault).split())
        raise InputError(f"{what} ({said or type(fault).__name__}); {advice}.") from fault


def first_line(error: BaseException) -> str:
    r"""Return the first line of what an error says, or its class where it says nothing.

    Example:
        >>> first_line(ValueError("a\nb")), first_line(AssertionError())
        ('a', 'AssertionError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """Turn an :class:`OSError` of this block into a sentence: ``path`` cannot be written.

    What PyTorch says where a disk refuses a part of its file is turned, too.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH.search(str(error)):
            raise
        # PyTorch's writer does not say why it failed; what it was handling may.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror or cause if isinstance(cause, OSError) else "the file is not whole"
        raise InputError(
            f"{path} cannot be written ({reason}); {_advice(cause)}, or choose another folder."
        ) from error


def _advice(error: object) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG:
        return "allow larger files (ulimit -f)"
    return "correct the path" if number in {*_PLACE, errno.EROFS} else "free space"


def stops_all(error: InputError) -> bool:
    """Say whether a full or read-only disk is the cause: no other case can be written either."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def disk_error(error: BaseException) -> InputError | None:
    """Return an error of disk or path as a sentence; ``None`` for any other error.

    Example:
        >>> print(disk_error(NotADirectoryError(20, "Not a directory", "a/b")))
        a/b cannot be read or written (Not a directory); correct the path, or choose another folder.
        >>> disk_error(RuntimeError("a programming error")) is None
        True
    """
    if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
        return InputError("the disk refused a file of weights; free space on it.")
    if isinstance(error, RuntimeError) and (loop := _LOOP.match(str(error))):
        return InputError(f"{loop[1]} is a link that leads back to itself; correct the path.")
    if not isinstance(error, OSError):
        return None
    if error.filename is not None and error.errno in _FULL | _PLACE:
        return InputError(
            f"{error.filename} cannot be read or written ({error.strerror}); {_advice(error)}, or "
            "choose another folder."
        )
    if error.errno in _FULL:
        return InputError(f"the disk refused a file ({error.strerror}); free space on it.")
    return None


def _raised_in(error: BaseException, package: str) -> bool:
    names = (str(f.f_globals.get("__name__")) for f, _ in walk_tb(error.__traceback__))
    return any(name.partition(".")[0] == package for name in names)


def memory_error(error: BaseException) -> InputError | None:
    """Tell a lack of memory, shared memory or open files in a sentence; ``None`` for other errors.

    Example:
        >>> print(memory_error(MemoryError("Unable to allocate 9 GiB")))
        there is too little memory (Unable to allocate 9 GiB); use smaller batches, patches or windows, fewer workers, or a larger voxel spacing.
        >>> memory_error(RuntimeError("a programming error")) is None
        True
    """  # noqa: E501  # the sentence is what is shown
    if isinstance(error, RecursionError) and any(_raised_in(error, p) for p in ("yaml", "json")):
        return InputError("a YAML or JSON file is nested too deeply to be read; correct it.")
    reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    code = error.errno if isinstance(error, OSError) else None
    processes = _raised_in(error, "multiprocessing")
    said = str(error) if isinstance(error, RuntimeError) else ""
    # By what the system counts: files, processes, shared memory, memory.
    if code in (errno.EMFILE, errno.ENFILE):
        return InputError(
            f"too many files are open at once ({reason}); allow more (ulimit -n), or use fewer "
            "workers."
        )
    refused = code == errno.EAGAIN and (processes or _raised_in(error, "subprocess"))
    if refused or _THREADS.search(said):
        return InputError(
            f"the system starts no more processes ({reason}); allow more (ulimit -u), or use fewer "
            "workers."
        )
    if _SHARED.search(said) or (code in _FULL and processes):  # of its semaphores
        return InputError(
            f"a process that reads data was ended or refused memory by the system ({reason}); use "
            "fewer workers (--data.num_workers 0 needs no shared memory), smaller batches, or a "
            "larger /dev/shm."
        )
    loaded = str(error) if isinstance(error, ImportError) else said
    if isinstance(error, MemoryError) or code == errno.ENOMEM or _MEMORY.search(loaded):
        return InputError(
            f"there is too little memory ({reason or 'Python could not get any'}); use smaller "
            "batches, patches or windows, fewer workers, or a larger voxel spacing."
        )
    return None


def restoring_error(error: BaseException) -> InputError | None:
    """Say that a checkpoint's state of the training is damaged, where a library stumbles over it.

    It does so as it restores that state, or at the first step that uses it. What a person's own
    class says, or does not survive, stays as it is.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    trainers = [f for f, name in zip(frames, modules, strict=True) if name == _TRAINER]
    path = next((f.f_locals["ckpt_path"] for f in trainers if f.f_locals.get("ckpt_path")), None)
    package = modules[-1].partition(".")[0]
    foreign = package not in (*_RESTORING, *sys.stdlib_module_names)
    restores = _CONNECTOR in modules and not foreign
    if path is None or not (restores or modules[-1].startswith(_USING_STATE)):
        return None
    reason = shorten(str(error).strip().partition("\n")[0].rstrip(".:"), 150)
    return InputError(
        f"{path} holds a state of the training that cannot be restored "
        f"({type(error).__name__}: {reason}); it is damaged, or was written by another version of "
        "a library. Use another checkpoint, or start from its weights with --init_from."
    )


def warn_in_one_line() -> None:
    """Print this package's warnings as the sentences they are, without the line that gave them."""
    others = warnings.formatwarning
    if others.__module__ == __name__:
        return  # it was called before

    def formatted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if Path(filename).is_relative_to(Path(__file__).parent):
            return f"pmixseg: {message}\n"
        return others(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
