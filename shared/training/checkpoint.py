"""Checkpoints: save, find the newest good one, rotate.

A checkpoint `step_00001000/` holds one folder per exported module (averaged weights: what people and later
stages read), `training.safetensors` (raw weights and optimizer state), `training.json`, and MANIFEST.json,
written last, with the size and sha256 of every file. Does not depend on what the tensors mean.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.config import InputError, say
from shared.disk import (
    MANIFEST,
    TEMPORARY,
    checkpoints,
    faults,
    path_of,
    put_back,
    read_tensors,
    replace_folder,
)


def save(
    parent: Path,
    step: int,
    exports: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    keep: int,
    score: float | None = None,
    length: dict[str, Any] | None = None,
) -> Path:
    """Write checkpoint `step`, then remove the oldest beyond `keep`, but for the one with the least score.

    `exports` are things with save_pretrained(folder), `length` is what `length_of` gives back. Raises
    InputError where a tensor is not finite or the disk has no room; what was there before stays untouched.
    """
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        cure = "lower the learning rate; older checkpoints stay"
        raise InputError(f"{parent}: not saved at step {step}, {wrong[0]} is not finite; {cure}")
    parent.mkdir(parents=True, exist_ok=True)
    put_back(parent)
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    need = bytes_needed(tensors, exports) + (1 << 20)  # and its small files
    if shutil.disk_usage(parent).free < need:
        cure = "free some disk and run the same command again"
        raise InputError(f"{parent}: no room for a checkpoint of {need >> 20} MiB; {cure}")

    def write(folder: Path) -> None:
        for name, module in exports.items():
            module.save_pretrained(folder / name)
        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(on_cpu, folder / "training.safetensors")
        facts = {"step": step, "score": score} | (length or {})
        (folder / "training.json").write_text(json.dumps(facts) + "\n")

    final = parent / f"step_{step:08d}"
    replace_folder(final, write)
    rotate(parent, keep)
    return final


def bytes_needed(tensors: dict[str, torch.Tensor], exports: dict[str, Any]) -> int:
    """What the tensors of a checkpoint will take on disk."""
    modules = [export for export in exports.values() if isinstance(export, torch.nn.Module)]
    weights = [tensor for module in modules for tensor in module.state_dict().values()]
    return sum(tensor.nbytes for tensor in [*tensors.values(), *weights])


def rotate(parent: Path, keep: int) -> None:
    """Remove all but the newest `keep`, at least two, and the one with the least score."""
    steps = [folder for folder in checkpoints(parent) if not folder.is_symlink()]
    best = _least(steps)
    for folder in steps[: -max(2, keep)]:
        if folder != best:
            shutil.rmtree(folder)


def _least(folders: Sequence[Path]) -> Path | None:
    """The checkpoint with the least score, the latest of equals; None where none has one."""
    found = min(reversed(folders), key=_score, default=None)
    return None if found is None or math.isinf(_score(found)) else found


def _score(folder: Path) -> float:
    """What a checkpoint validated as; infinite where it does not say."""
    try:
        score = json.loads((folder / "training.json").read_text())["score"]
    except (OSError, ValueError, KeyError):
        score = None
    return math.inf if score is None else score


def newest(parent: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None if there is none at all.

    A broken one is named and passed over. Raises InputError if there are only broken ones: a run is never
    begun afresh without a word.
    """
    found = checkpoints(parent)
    for folder in reversed(found):
        wrong = ["a link leads out of the run"] if folder.is_symlink() else faults(folder)
        if not wrong:
            return folder
        say(f"warning: {folder} is broken ({wrong[0]}); going back to an older one")
    if found:
        cure = "restore one from a copy, or remove the folder to start afresh"
        raise InputError(f"{parent}: every checkpoint is broken; {cure}")
    return None


def is_measured(parent: Path) -> bool:
    """Whether the newest checkpoint says how it validated."""
    return any(math.isfinite(_score(folder)) for folder in checkpoints(parent)[-1:])


def best(parent: Path) -> Path:
    """The checkpoint that validated best, of those that are as they were written. Raises InputError."""
    whole = [folder for folder in checkpoints(parent) if not folder.is_symlink() and not faults(folder)]
    found = _least(whole)
    if found is None:
        raise InputError(f"{parent}: no checkpoint here says how it validated; take the newest")
    return found


def recover(parent: Path) -> Path | None:
    """`newest`, for a training that goes on from there.

    The broken ones that it passed over are renamed to broken_step_...: they must not count among those to
    keep.
    """
    put_back(parent)
    found = newest(parent)
    if found is None:
        return None
    for folder in checkpoints(parent):
        if folder.name > found.name:
            aside = parent / f"broken_{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)
    return found


def required(parent: Path) -> Path:
    """The newest good checkpoint of a stage to build on. Raises InputError if there is none."""
    found = newest(parent)
    if found is None:
        raise InputError(f"{parent}: no checkpoint yet; run {parent.parent.name}/train.py first")
    return found


def init_key(stage: str) -> str:
    """The key of the recipe that says what weights a stage, named by its folder, begins from."""
    return f"{stage.partition('_')[0]}.init"


def beginning(init: str, stage: str) -> Path:
    """The folder of weights that a stage is to begin from: a checkpoint, an export, or a run's newest.

    Arguments:
        init: what the recipe names.
        stage: the stage's folder in a run, such as stage1_vae.

    Raises:
        InputError: where there is none, or a file of it is missing or damaged.
    """
    key, place = init_key(stage), path_of(init)
    found = newest(place / stage / "checkpoints") or place
    if not (found / MANIFEST).is_file():
        raise InputError(f"{key}: {init} is no checkpoint, no export and no run with a trained {stage}")
    wrong = faults(found)
    if wrong:
        raise InputError(f"{key}: {found}: {wrong[0]}; restore it from a copy, or name another")
    return found


def fill(model: torch.nn.Module, file: Path) -> tuple[int, list[str]]:
    """Fill a model with what fits of a file of weights; how many tensors that are, and which were left.

    Left are tensors of the model that keep what they are, and those of the file that have no place in it.
    """
    given = read_tensors(file)
    own = model.state_dict()
    left = [f"{name} (no place here)" for name in given if name not in own]
    filled = 0
    for name, tensor in own.items():
        if name not in given:
            left.append(f"{name} (not there)")
        elif given[name].shape != tensor.shape:
            left.append(f"{name} ({list(given[name].shape)} there, {list(tensor.shape)} here)")
        else:
            own[name] = given[name]
            filled += 1
    model.load_state_dict(own)
    return filled, left


def step_of(folder: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return length_of(folder)["step"]


def length_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its training's length: step, max_steps, and where averages stand still."""
    return json.loads((folder / "training.json").read_text())
