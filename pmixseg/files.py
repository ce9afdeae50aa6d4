"""Write files safely: each is complete or absent, and lies in its intended folder."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from pmixseg.errors import InputError, writing


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file so that nobody ever sees half of it.

    The block writes to the path that it is given: a new file in the same folder, whose name
    cannot be foretold and ends like that of ``path``. Where the block succeeds the file takes its
    name, in place of what had it; where it fails nothing remains. The folder is made.

    Raises:
        InputError: the disk is full or read-only, or the path cannot be written, or is a device.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Path(folder) / "runs" / "x.csv"
        ...     with whole(table) as part:
        ...         written, there = part.write_text("a,b"), table.exists()
        ...     print(written, there, table.read_text())
        3 False a,b
    """
    part: Path | None = None
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is a device or pipe, which a file would replace; name a file.")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _new_file(path)
            yield part
            part.replace(path)
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a file of text in UTF-8, as a whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _new_file(path: Path) -> Path:
    # Readers such as nibabel tell a format by the end of the name.
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    while True:
        part = path.with_name(f".{token_hex(8)}{ending}")
        try:
            # Exclusive, so that a link that someone planted under this name is not followed.
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return part


@contextmanager
def hidden_folder_near(folder: Path) -> Iterator[Path]:
    """Make a hidden, empty folder on the same disk as ``folder``, to be renamed to it when full.

    What has not been renamed by the end of the block is removed. The folder need not exist; the one
    around it must.
    """
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        part.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def lock_folder(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder against other processes that ask for it, until the descriptor is closed.

    A process that ends, however it does, lets go of it, and no file stays behind. The folder is
    made. ``None``: the system or the disk knows no such locks.

    Raises:
        InputError: another process, or another part of this one, holds it; not with ``wait``.
    """
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; whoever writes there says what is wrong
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise InputError(
            f"another training writes into {folder}; wait for its end, or choose another --run."
        ) from error
    return descriptor


def inside(folder: Path, name: str, what: str) -> Path:
    """Return the path of ``name`` in ``folder``, where a name must not lead anywhere else.

    ``what`` the name is of, for the error, is said by a person, a layout or a checkpoint.

    Raises:
        InputError: it holds a separator or a control character, or is no name at all.

    Example:
        >>> inside(Path("results"), "patient7_seg.nii.gz", "case").as_posix()
        'results/patient7_seg.nii.gz'
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise InputError(
            f"{what} {name!r} cannot name a file or folder; give a name without '/', '\\', tab "
            "or line break that is not '.' or '..'."
        )
    return folder / name


def not_beside(out: Path, sources: Iterable[Path]) -> None:
    """Refuse a folder of results that holds what they are made from.

    A label map beside scans would be taken for the label that somebody drew.
    """
    for source in sources:
        if source.parent.resolve() == out.resolve():
            raise InputError(
                f"{out} holds {source.name}, which is read here, and results beside it would be "
                "taken for its label; choose another output folder."
            )


def not_within(out: Path, folder: Path) -> None:
    """Refuse a folder of results that is, or lies in, the folder which is searched for scans."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{out} lies in {folder}, which is searched for scans, so results would be taken for "
            "scans; choose a folder outside of it."
        )


def not_among(out: Path, sources: Iterable[Path]) -> None:
    """Refuse an output that, under whatever name, would take the place of what it is made from."""
    if out.resolve() in {source.resolve() for source in sources}:
        raise InputError(f"{out} is read here and would be replaced; choose another output.")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
