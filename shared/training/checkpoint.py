"""Atomic, verified, pickle-free folders of tensors and JSON: save, find the newest good one, load, rotate.

A checkpoint `step_00001000/` holds one folder per exported module (averaged weights: what people and later stages
read), `training.safetensors` (raw weights and optimizer state), `training.json`, and MANIFEST.json, written last, with
the size and sha256 of every file. Knows disks; refuses to know what the tensors mean.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from shared.config import InputError, say
from shared.disk import WRITING, faults, replace_folder

# ---------------------------------------------------------------- one folder, written whole or not at all


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


