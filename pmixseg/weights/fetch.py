"""Find the local file or folder of a model: a path, a name of the list, an address.

Fetched files lie in a cache folder, each under the hash of its address. They are checked against
the SHA-256 that their description states, and are read from there ever after: a second use needs
no network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urldefrag, urlsplit
from urllib.request import Request, urlopen

from platformdirs import user_cache_path

from pmixseg.argument_checks import checked
from pmixseg.errors import InputError, explained, first_line
from pmixseg.files import file_hash
from pmixseg.weights.catalogue import CATALOGUE
from pmixseg.weights.published import DESCRIPTION, FILES, WEIGHTS, check_weights, read_description

CHUNK = 1 << 20
"""Bytes that are read at once."""

PATIENCE = 30.0
"""Seconds without an answer after which a server counts as unreachable."""


def cache_folder() -> Path:
    """Return the folder of fetched models: ``$PMIXSEG_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("PMIXSEG_CACHE")
    return Path(chosen) if chosen else user_cache_path("pmixseg") / "models"


@checked
def local_copy(source: str | Path) -> Path:
    """Return the local file or folder of a model, fetched first where it is not there yet.

    Args:
        source: one of

            * the path of a checkpoint, or of a folder that ``pmixseg publish`` wrote;
            * a name of :data:`~pmixseg.weights.CATALOGUE`;
            * ``hf://owner/repository[@revision]``, a published folder on the Hugging Face Hub
              (extra ``hub``);
            * ``https://…/model.ckpt``, or ``https://…/folder`` of a published model. With
              ``#sha256=HASH`` at its end the file (of a folder: its ``pmixseg.json``) must have
              this hash.

    Raises:
        InputError: nothing of that name, no network, a file that is not there, or a hash that
            does not hold.

    Example:
        >>> local_copy("best.ckpt")
        PosixPath('best.ckpt')
    """
    text = str(source)
    if text.startswith("hf://"):
        return _from_hub(text)
    if text.startswith(("https://", "http://")):
        return _from_address(text)
    if text not in CATALOGUE or Path(text).exists():
        return Path(source)
    entry = CATALOGUE[text]
    if entry.address is None:
        raise InputError(
            f"the weights of '{text}' are kept by their authors ({entry.page}); fetch the file "
            f"from there, then: {entry.reading}"
        )
    return local_copy(entry.address)


def _from_address(address: str) -> Path:
    bare, fragment = urldefrag(address)
    parts = urlsplit(bare)
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise InputError(f"{address}: an http:// address can be changed on its way; use https://.")
    if fragment and not fragment.startswith("sha256="):
        raise InputError(f"{address}: what follows '#' must be sha256=HASH.")
    expected = fragment.removeprefix("sha256=").lower() or None
    # Both addresses of a published folder, with and without the file's name, are one place.
    bare = bare.removesuffix("/").removesuffix(f"/{DESCRIPTION}")
    folder = cache_folder() / hashlib.sha256(bare.encode()).hexdigest()[:32]
    if bare.endswith(".ckpt"):
        return _download(bare, folder / bare.rsplit("/", 1)[-1], expected)
    _download(f"{bare}/{DESCRIPTION}", folder / DESCRIPTION, expected)
    about = read_description(folder)
    _download(f"{bare}/{WEIGHTS}", folder / WEIGHTS, about.sha256)
    return folder


def _from_hub(address: str) -> Path:
    name, _, revision = address.removeprefix("hf://").partition("@")
    if len([part for part in name.split("/") if part]) != 2:
        raise InputError(f"{address} is not of the form hf://owner/repository[@revision].")
    needs = f"{address}: the Hugging Face Hub needs an extra"
    with explained(needs, "pip install 'pmixseg[hub]'", ImportError):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    # The three files of a published model, and nothing else of the repository.
    try:
        path = snapshot_download(
            name,
            revision=revision or None,
            cache_dir=cache_folder() / "hub",
            allow_patterns=list(FILES),
            library_name="pmixseg",
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(
            f"{address} cannot be fetched ({first_line(error)}); check the name and the network."
        ) from error
    folder = Path(path)
    check_weights(folder)
    return folder


def _download(address: str, target: Path, expected: str | None) -> Path:
    """Fetch one file into the cache, unless it is there; go on where an earlier try stopped."""
    if target.is_file() and (expected is None or file_hash(target) == expected):
        return target
    part = target.with_name(f"{target.name}.download")
    with _naming_address(address, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _append_rest(address, part)
        received = file_hash(part)
        if expected is not None and received != expected:
            part.unlink()
            raise InputError(
                f"{address} has SHA-256 {received[:12]}…, not {expected[:12]}…: it was changed or "
                "damaged; ask its owner, and do not use it."
            )
        part.replace(target)
    return target


def _append_rest(address: str, part: Path) -> None:
    """Write what is still missing of a file; a server that knows no ranges sends all of it."""
    start = part.stat().st_size if part.exists() else 0
    request = Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urlopen(request, timeout=PATIENCE)
    except HTTPError as error:
        if error.code != 416 or not start:  # 416: nothing is missing
            raise
        return
    with answer:
        resumed = answer.status == 206
        with part.open("ab" if resumed else "wb") as file:
            shutil.copyfileobj(answer, file, CHUNK)
        whole = int(answer.headers.get("Content-Length", 0)) + (start if resumed else 0)
    if answer.headers.get("Content-Length") and part.stat().st_size < whole:
        raise URLError(f"the connection broke after {part.stat().st_size} of {whole} bytes")


@contextmanager
def _naming_address(address: str, target: Path) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        raise InputError(
            f"{address} cannot be fetched (the server answers {error.code} {error.reason}); check "
            "the address."
        ) from error
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{address} cannot be fetched ({reason}); check the network and try again: it goes on "
            "where it stopped."
        ) from error
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}); make room, or choose another folder "
            "with PMIXSEG_CACHE."
        ) from error
