"""Atomic, verified, pickle-free folders of tensors and JSON: save, find the newest good one, load, rotate.

A checkpoint `step_00001000/` holds one folder per exported module (averaged weights: what people and later stages
read), `training.safetensors` (raw weights and optimizer state), `training.json`, and MANIFEST.json, written last, with
the size and sha256 of every file. Knows disks; refuses to know what the tensors mean.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shared.config import InputError, say

MANIFEST = "MANIFEST.json"
WRITING = ".tmp-"


# ---------------------------------------------------------------- one folder, written whole or not at all


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


# ---------------------------------------------------------------- checkpoints


def _steps(parent: Path) -> list[Path]:
    """The checkpoints under a folder, newest first."""
    return sorted((p for p in parent.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name)), reverse=True)


def _need(tensors: dict[str, torch.Tensor], exports: dict) -> int:
    modules = [m for m in exports.values() if isinstance(m, torch.nn.Module)]
    sizes = [t.nbytes for t in tensors.values()] + [t.nbytes for m in modules for t in m.state_dict().values()]
    return sum(sizes) + (1 << 20)


def save(parent: Path, step: int, exports: dict, tensors: dict[str, torch.Tensor], keep: int, score: float | None = None) -> Path:
    """Write checkpoint `step`, then remove the oldest beyond `keep`, but for the one with the least score.

    `exports` are things with save_pretrained(folder). Raises InputError where a tensor is not finite or the disk has no
    room; what was there before stays untouched.
    """
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"{parent}: not saved at step {step}, {wrong[0]} is not finite; lower the learning rate; older checkpoints stay")
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{WRITING}*"):
        shutil.rmtree(leftover)
    if shutil.disk_usage(parent).free < (need := _need(tensors, exports)):
        raise InputError(f"{parent}: no room for a checkpoint of {need >> 20} MiB; free some disk and run the same command again")

    def write(folder: Path) -> None:
        for name, module in exports.items():
            module.save_pretrained(folder / name)
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, folder / "training.safetensors")
        (folder / "training.json").write_text(json.dumps({"step": step, "score": score}) + "\n")

    final = parent / f"step_{step:08d}"
    replace_folder(final, write)
    rotate(parent, keep)
    return final


def rotate(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep`, at least two, and the one with the least score."""
    steps = [folder for folder in _steps(parent) if not folder.is_symlink()]
    scores = {folder: score for folder in steps if (score := _score(folder)) is not None}
    best = min(scores, key=scores.get, default=None)
    for folder in steps[max(2, keep) :]:
        if folder != best:
            shutil.rmtree(folder)


def _score(folder: Path) -> float | None:
    try:
        return json.loads((folder / "training.json").read_text())["score"]
    except (OSError, ValueError, KeyError):
        return None


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None if there is none at all.

    A broken one is named and passed over. Raises InputError if there are only broken ones: a run is never begun
    afresh without a word.
    """
    found = _steps(parent)
    for folder in found:
        if not (wrong := ["a link leads out of the run"] if folder.is_symlink() else faults(folder)):
            return folder
        say(f"warning: {folder} is broken ({wrong[0]}); going back to an older one")
    if found:
        raise InputError(f"{parent}: every checkpoint is broken; restore one from a copy, or remove the folder to start afresh")
    return None


def recover(parent: Path) -> Path | None:
    """`newest`, for a training that goes on from there.

    The broken ones that it passed over are renamed to broken_step_...: they must not count among those to keep.
    """
    found = newest(parent)
    for folder in _steps(parent):
        if folder.name > found.name:
            shutil.rmtree(aside := parent / f"broken_{folder.name}", ignore_errors=True)
            folder.replace(aside)
    return found


def required(parent: Path) -> Path:
    """The newest good checkpoint of a stage that something else builds on. Raises InputError where there is none yet."""
    if (found := newest(parent)) is None:
        raise InputError(f"{parent}: no checkpoint yet; run {parent.parent.name}/train.py first")
    return found


def step_of(folder: Path) -> int:
    return json.loads((folder / "training.json").read_text())["step"]


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
