"""Whole or not at all: files and folders written atomically, verified against a manifest, and read without pickle.

Does not depend on what the files mean.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from shared.config import InputError

MANIFEST = "MANIFEST.json"
WRITING = ".tmp-"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Give every file the permissions of the umask, force it to disk and list it in the manifest."""
    os.umask(umask := os.umask(0))
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o666 & ~umask)
        fsync(path)
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}, indent=1) + "\n")
    fsync(folder / MANIFEST)
    fsync(folder)


def faults(folder: Path, entries: dict | None = None) -> list[str]:
    """What is wrong with a sealed folder: files missing, cut short or changed. Empty if it is as it was written.

    `entries` {file: {size, sha256}} come from the folder's own manifest unless they are given.
    """
    try:
        if entries is None:
            entries = json.loads((folder / MANIFEST).read_text())["files"]
        return [fault for name, entry in entries.items() if (fault := _fault(folder, name, entry))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} missing or unreadable"]


def _fault(folder: Path, name: str, entry: dict) -> str | None:
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        return f"{name} points outside"
    if not path.is_file():
        return f"{name} missing"
    if path.stat().st_size != entry["size"]:
        return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    return None if sha256(path) == entry["sha256"] else f"{name} was changed"


def replace_folder(final: Path, write) -> None:
    """Let `write(folder)` fill a new folder, seal it, and put it in the place of an older one.

    Raises InputError where the disk refuses; the older folder is untouched then.
    """
    temporary, old = (final.parent / f"{WRITING}{kind}{final.name}" for kind in ("", "old-"))
    if old.is_dir() and not final.exists():  # the process died between the two renames below
        old.replace(final)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        seal(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{final}: not saved ({getattr(error, 'strerror', None) or error}); what was there before is untouched") from None
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_module(kind: type, folder: Path):
    """A diffusers model from a local folder of safetensors: no pickle, no network. Raises InputError."""
    try:
        return kind.from_pretrained(folder.resolve(), use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: no {kind.__name__} can be loaded from here ({' '.join(str(error).split())[:200]})") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises InputError where it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None


def write_whole(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def read_json(path: Path) -> dict | None:
    """A JSON file; None where there is none. Raises InputError where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path}: unreadable; remove {path.parent} and encode again") from None


def write_file(path: Path, write) -> None:
    """A file that `write(temporary)` makes, whole or not at all. Raises InputError where the disk refuses."""
    temporary = path.parent / f"{WRITING}{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        fsync(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: not saved ({error}); the same command goes on from here") from None


def write_json(path: Path, tree: dict) -> None:
    write_file(path, lambda temporary: temporary.write_text(json.dumps(tree, indent=1) + "\n"))


def map_tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor of a safetensors file, memory-mapped: nothing is read before it is used.

    Raises InputError where the file is missing, cut short or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header: its size, the offsets, no overlaps
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
            dtype = {"F32": np.float32, "I64": np.int64}[entry["dtype"]]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable shard of latents ({' '.join(str(error).split())})") from None
    array = np.memmap(path, dtype, mode="c", offset=8 + length + entry["data_offsets"][0], shape=tuple(entry["shape"]))
    return torch.from_numpy(array)


def weights_file(name: str, place: str | None = None) -> Path | None:
    """The local file of a network's weights: named, or in the named folder, or in LATENT_STACK_WEIGHTS; None to download."""
    key = "stage1.lpips.weights" if place else "LATENT_STACK_WEIGHTS"
    place = place or os.environ.get("LATENT_STACK_WEIGHTS")
    if not place:
        return None
    path = Path(place).expanduser()
    path = path / f"{name}.safetensors" if path.is_dir() else path
    if path.is_file():
        return path
    raise InputError(f"{key}: no such file: {path}")
