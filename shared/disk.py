"""Files and folders that are on disk whole or not at all.

They are written beside their place, forced to disk, listed in a manifest and renamed. One way to write and
verify for checkpoints, caches and exports. Tensors are safetensors; there is no pickle. Does not depend on
what the files mean, nor on torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from shared.config import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

MANIFEST = "MANIFEST.json"
FORMAT = 1  # of every manifest; a later one is refused, not guessed at
TEMPORARY = ".tmp-"  # how the name of a file or folder that is being written begins


# ---------------------------------------------------------------- one file


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that `write(temporary)` makes, whole or not at all. Raises InputError where the disk refuses."""
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        share(temporary)
        fsync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not saved ({error}); the same command goes on from here") from None
    finally:  # what is whole has its name by now
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, content: str) -> None:
    """In UTF-8; of a name that is not what cannot be shown is escaped."""
    how = {"encoding": "utf-8", "errors": "backslashreplace"}
    write_file(path, lambda temporary: temporary.write_text(content, **how))


def write_json(path: Path, tree: dict) -> None:
    write_text(path, json.dumps(tree, indent=1) + "\n")


def write_npy(path: Path, dtype: "np.dtype", shape: tuple[int, ...], blocks: Iterable["np.ndarray"]) -> None:
    """An .npy of blocks of rows, as they come. Not mapped: a page without room on disk ends a process."""
    import numpy as np

    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, head)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)


def read_json(path: Path, cure: str) -> dict | None:
    """A JSON file; None where there is none. Raises InputError, with the cure, where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path}: unreadable; {cure}") from None


def path_of(name: str) -> Path:
    """The path that a person means: ~ is a home, unless nobody has it, of which Path.expanduser would die."""
    return Path(os.path.expanduser(name))


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return path if path.is_dir() else existing(path.absolute().parent)


def check_writable(folder: Path) -> None:
    """Raises InputError where nothing can be written into a folder that is there or will be."""
    try:
        place = existing(folder)
        writable = os.access(place, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    above = [path for path in (folder, *folder.absolute().parents) if path.is_file()]
    if above or not writable:
        raise InputError(
            f"{folder}: cannot be written ({'a file' if above else 'no right to'}); name another folder"
        )


def free(path: Path) -> int:
    """Bytes that are free where a file or folder is or will be."""
    return shutil.disk_usage(existing(path)).free


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share(path: Path) -> None:
    """Give a file the umask's permissions: some libraries write for their user alone."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(PermissionError):  # of a disk of Windows, which has none
        path.chmod(0o666 & ~umask)


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shared disks do so for files alone
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- one folder


def replace_folder(final: Path, write: Callable[[Path], Any], carry: bool = False) -> None:
    """Let `write(folder)` fill a new folder, seal it, and put it where an older one is.

    Raises InputError where the disk refuses; the older folder is untouched then.

    Arguments:
        final: the folder.
        write: fills it.
        carry: what somebody else put into the older one, such as a licence, stays; it is not sealed.
    """
    temporary = final.parent / f"{TEMPORARY}{final.name}"
    old = final.parent / f"{TEMPORARY}old-{final.name}"
    put_back(final.parent)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        seal(temporary)
        for file in foreign(final) if carry and final.is_dir() else []:
            place = temporary / file.relative_to(final)
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{final}: not saved ({reason}); what was there before is untouched") from None
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(parent: Path) -> list[Path]:
    """The checkpoints of a folder, step_00001000 and so on, oldest first; a copy by another name is none."""
    return sorted(path for path in parent.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))


def put_back(parent: Path) -> None:
    """Folders that were to be replaced by a process that died in between get their names again."""
    for old in parent.glob(f"{TEMPORARY}old-*"):
        final = parent / old.name.removeprefix(f"{TEMPORARY}old-")
        if not final.exists():
            old.replace(final)


def seal(folder: Path) -> None:
    """Give every file the umask's permissions, force it to disk, list it in the manifest, written last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        share(path)
        fsync(path)
    manifest = {"format": FORMAT, "files": entries(folder, files)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    fsync(folder / MANIFEST)
    fsync(folder)


def entries(folder: Path, files: list[Path]) -> dict[str, dict]:
    """The manifest's line for each file: its size and sha256."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }


def check_format(manifest: Any, path: Path) -> None:
    """Raises InputError where a manifest is of a later format than this version reads."""
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, int) and found > FORMAT:
        later = f"format {found} is of a later version of Latent Stack (this one reads {FORMAT})"
        raise InputError(f"{path}: {later}")


def faults(folder: Path, listed: dict | None = None) -> list[str]:
    """What is wrong with a sealed folder: files missing, cut short or changed. Empty if it is as written.

    `listed` {file: {size, sha256}} comes from the folder's own manifest unless it is given. Raises InputError
    where that manifest is of a later format: such a folder is not broken.
    """
    try:
        if listed is None:
            manifest = json.loads((folder / MANIFEST).read_text())
            check_format(manifest, folder / MANIFEST)
            listed = manifest["files"]
        found = [_fault(folder, name, entry) for name, entry in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} missing or unreadable"]
    return [fault for fault in found if fault is not None]


def _fault(folder: Path, name: str, entry: dict) -> str | None:
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        return f"{name} points outside (a link, as in a Hugging Face cache: hf download --local-dir DIR)"
    if not path.is_file():
        return f"{name} missing"
    if path.stat().st_size != entry["size"]:
        return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    return None if sha256(path) == entry["sha256"] else f"{name} was changed"


def sealed(folder: Path) -> dict[str, dict]:
    """What the manifest of a folder lists; nothing where there is none."""
    return (read_json(folder / MANIFEST, "restore it from a copy") or {}).get("files", {})


def foreign(folder: Path) -> list[Path]:
    """Files in a sealed folder that its manifest does not list: somebody else put them there."""
    listed = sealed(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if path.relative_to(folder).as_posix() not in {*listed, MANIFEST}]


# ---------------------------------------------------------------- one process in a folder


class Lock:
    """A folder for one process alone, as its file .lock says; it ends with the process, however that ends."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.file: IO | None = None

    def take(self) -> None:
        """Raises InputError, naming who has it, where another process does. Not all disks know locks."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+")  # noqa: SIM115 (it is open as long as the lock is held)
            # A lock of this process alone: loader processes that it forks do not hold it, too.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {platform.node()}\n")
            self.file.flush()
        except BlockingIOError:
            owner = self.path.read_text().strip() or "another process"
            self.release()
            cure = "wait for it, stop it, or choose another run_dir"
            raise InputError(f"{self.path.parent}: {owner} is at work there; {cure}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                why = f"{self.path}: not written ({error.strerror})"
                raise InputError(f"{why}; choose another run_dir") from None

    def release(self) -> None:
        if self.file:
            self.file.close()
            self.file = None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same file. Where the disk knows no locks, do not."""
    there = False
    while not there:  # who waited may have got the lock of a file that its holder has removed
        file = open(path, "a")  # noqa: SIM115 (it is open as long as the lock is held)
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not there:
            file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


# ---------------------------------------------------------------- tensors and weights


def read_tensors(path: Path) -> dict[str, "torch.Tensor"]:
    """All tensors of a safetensors file. Raises InputError where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({' '.join(str(error).split())})"
        ) from None


def load_module(kind: Any, folder: Path, dtype: Any = None) -> Any:
    """A diffusers model of a class from a local folder: no pickle, no network. Raises InputError.

    dtype: of its weights; None: as they were saved.
    """
    local = {"use_safetensors": True, "local_files_only": True}
    try:
        return kind.from_pretrained(folder.resolve(), torch_dtype=dtype, **local)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: no {kind.__name__} can be loaded from here ({reason})") from None


def weights_file(name: str, place: str | None = None) -> Path | None:
    """A backbone's local weights file: `place`, or in it, or in LATENT_STACK_WEIGHTS; None to download."""
    key = "stage1.lpips.weights" if place else "LATENT_STACK_WEIGHTS"
    place = place or os.environ.get("LATENT_STACK_WEIGHTS")
    if not place:
        return None
    path = path_of(place)
    if path.is_dir():
        path = path / f"{name}.safetensors"
    if path.is_file():
        return path
    raise InputError(f"{key}: no such file: {path}")
