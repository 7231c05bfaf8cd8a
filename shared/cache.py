"""The user's cache folder: what takes long to make, made once. It may be removed at any time."""

import contextlib
import hashlib
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from shared import disk
from shared.config import InputError

ABANDONED = 3600  # seconds without a write
UNUSED = 30 * 24 * 3600  # likewise, and without a reader
MOST, SHARE = 20 << 30, 0.1  # bytes, and of the free disk: what the rows of a key may take
CHECK = 4  # bytes of a row's checksum


def _place(key: str, suffix: str) -> Path:
    """Of the file of a key."""
    folder = disk.path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "latent-stack"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"


def cached(key: str, write: Callable[[Path], None]) -> Path:
    """An array's file in the cache folder, made by `write(path)` if not there yet; whole or not at all.

    Of the processes on a machine one makes it, the others wait.
    """
    target = _place(key, ".npy")
    if target.is_file():
        return target
    # Machines that share a home folder may have processes of the same number.
    temporary = target.parent / f"{disk.TEMPORARY}{uuid.uuid4().hex}-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with disk.alone(target.with_suffix(".lock")):
            if not target.is_file():
                # What killed processes have left; a young one may be another's work, where nothing locks.
                _remove_old(target.parent.glob(f"{disk.TEMPORARY}*-{target.name}"), ABANDONED)
                write(temporary)
                temporary.replace(target)
    except OSError as error:
        cure = "XDG_CACHE_HOME chooses another place"
        raise InputError(f"{target}: cannot be written ({error}); {cure}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _remove_old(files: Iterable[Path], seconds: float) -> None:
    """Remove files that were neither written nor read for so long."""
    for file in files:
        with contextlib.suppress(OSError):
            state = file.stat()
            if time.time() - max(state.st_mtime, state.st_atime) > seconds:
                file.unlink()


class CachedRows:
    """Rows of equal length in one file of the cache folder, each kept when it was made.

    A row is taken where its checksum is that of its bytes and of its origin: none of an origin that changed,
    none that a full disk or a lost machine has left half-written. So processes and machines share the file
    without a lock. Nothing is kept where rows might take more than MOST bytes or a tenth of the free disk,
    nor where it cannot be written to.

    Arguments:
        key: what all rows have in common.
        count: of rows.
        length: of a row, in bytes.
    """

    def __init__(self, key: str, count: int, length: int):
        self.length = length
        self._stride = CHECK + length
        self._whole = count * self._stride
        self._path = _place(f"{key} {length}", ".rows")
        self._keeps: bool | None = None  # not known yet

    def take(self, row: int, origin: str) -> bytes | None:
        """A row that was made of this origin; None where there is none."""
        try:
            with open(self._path, "rb", buffering=0) as file:
                file.seek(row * self._stride)
                found = file.read(self._stride)
        except OSError:
            return None
        whole = len(found) == self._stride
        return found[CHECK:] if whole and found[:CHECK] == _check(origin, found[CHECK:]) else None

    def keep(self, row: int, origin: str, content: bytes) -> None:
        """Keep a row that was made of an origin, if it can be kept."""
        if self._keeps is False:
            return
        try:
            if self._keeps is None:
                self._prepare()
            if self._keeps:
                with open(self._path, "wb", buffering=0, opener=_not_emptied) as file:
                    file.seek(row * self._stride)
                    file.write(_check(origin, content) + content)
        except OSError:
            self._keeps = False

    def _prepare(self) -> None:
        """Find out whether there is room, and make some: rows that nobody has used for a month go."""
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(set(folder.glob("*.rows")) - {self._path}, UNUSED)
        self._keeps = self._whole < min(MOST, SHARE * disk.free(folder))


def _not_emptied(path: str, _: int) -> int:
    """Open a file to write into, made where it is not there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)


def _check(origin: str, content: bytes) -> bytes:
    return zlib.crc32(content, zlib.crc32(origin.encode())).to_bytes(CHECK, "little")
