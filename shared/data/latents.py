"""Saved latents: a folder of shards, its fingerprint and manifest; and the data set of stage 2.

A cache folder holds fingerprint.json, written first; {train,val}/00000.safetensors ... with `moments`
(N,2c,h,w) = [mean, logvar], float16 or float32, and, where the images have classes, `label` (N,) int64; vae/
and value_transform/, so that what stage 2 makes can be decoded; and manifest.json, written last. Does not
depend on how a VAE computes. Dimension key: N images, B batch, c h w latents.
"""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from shared import disk
from shared.config import InputError, differences
from shared.data import shard

SHARD = 4096  # images in one shard
PATIENCE = 60  # seconds, with the directory cache of a shared disk
SPLITS = ("train", "val")
MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"
VERIFIED = ".verified"  # which shards were found to be as they were written

Plan = dict[str, list[tuple[Path, range]]]  # the shards of each split, and the images that each holds


# ---------------------------------------------------------------- what the latents were made of


def fingerprint(checkpoint: Path, data: dict[str, dict]) -> dict[str, dict]:
    """What latents depend on: VAE weights and value transform of a checkpoint, and the data's identity."""
    files = sorted(path for name in ("vae", "value_transform") for path in (checkpoint / name).iterdir())
    made_by = {f"{path.parent.name}/{path.name}": disk.sha256(path)[:32] for path in files}
    return {"made by": made_by, "data": data}


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a finished cache; None where there is none."""
    manifest = disk.read_json(folder / MANIFEST, f"remove {folder} and encode again")
    disk.check_format(manifest, folder / MANIFEST)
    return manifest


def read_fingerprint(folder: Path) -> dict | None:
    return disk.read_json(folder / FINGERPRINT, f"remove {folder} and encode again")


def refuse_if_stale(folder: Path, wanted: dict) -> None:
    """Raises InputError if the folder holds latents of another VAE, other data or another value transform."""
    found, cure = read_fingerprint(folder), "remove the folder and encode again"
    if found is None and any(folder.glob("*/*.safetensors")):
        raise InputError(f"{folder} does not say what its latents were made of; {cure}")
    changed = differences(found, wanted) if found else []
    if changed:
        raise InputError(f"{folder} is stale, it was made with: {'; '.join(changed)}; {cure}")


# ---------------------------------------------------------------- writing


def begin(folder: Path, wanted: dict) -> None:
    """Claim a folder for latents of a fingerprint; an interrupted cache of the same fingerprint goes on."""
    refuse_if_stale(folder, wanted)
    disk.write_json(folder / FINGERPRINT, wanted)


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / split / f"{number:05d}.safetensors"


def planned(folder: Path, images: Mapping[str, int]) -> Plan:
    """The shards of a cache whose splits have these numbers of images, and the images that each holds."""
    return {
        split: [
            (shard_path(folder, split, first // SHARD), range(first, min(first + SHARD, count)))
            for first in range(0, count, SHARD)
        ]
        for split, count in images.items()
    }


def finish(
    folder: Path,
    checkpoint: Path,
    per_element: bool,
    classes: list[str],
    plan: Plan,
    summaries: Mapping[Path, shard.Summary],
) -> dict[str, Any]:
    """Copy the decoder beside the latents and write the manifest, of the summaries of all shards.

    Raises InputError where a shard of the plan is not there.
    """
    for path, rows in (entry for entries in plan.values() for entry in entries):
        _wait_for_shard(path, len(rows))
    copies = []
    for name in ("vae", "value_transform"):
        for file in sorted((checkpoint / name).iterdir()):
            copies.append(folder / name / file.name)
            disk.write_file(copies[-1], functools.partial(shutil.copyfile, file))
    shards = [path for split in SPLITS for path, _ in plan[split]]
    listed = {path.relative_to(folder).as_posix(): summaries[path].entry for path in shards}
    mean, std = shard.statistics([summaries[path] for path, _ in plan["train"]], per_element)
    manifest = {
        "format": disk.FORMAT,
        "files": listed | disk.entries(folder, copies),
        "classes": classes,
        "codec": {"mean": mean.float().tolist(), "std": std.float().tolist()},
    }
    _remember(folder, listed)
    disk.write_json(folder / MANIFEST, manifest)
    return manifest


def _wait_for_shard(path: Path, images: int) -> None:
    """A file that another machine has just written may take a while to be seen on a shared disk."""
    deadline = time.monotonic() + PATIENCE
    while not shard.is_whole(path, images):
        if time.monotonic() > deadline:
            raise InputError(f"{path}: not there, or not of {images} images; run the same command again")
        time.sleep(1)


# ---------------------------------------------------------------- reading


@dataclass
class Cache:
    """A finished folder of latents, opened."""

    folder: Path
    manifest: dict[str, Any]
    num_workers: int | None = None  # loader processes; null: as for images, some on a GPU machine, else none

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    def split(self, name: str) -> "Latents":
        """The latents of `train` or `val`."""
        files = sorted(self.manifest["files"])
        shards = [self.folder / file for file in files if file.startswith(f"{name}/")]
        return Latents(shards, self.num_workers)


def open_cache(folder: Path) -> Cache:
    """The cache in a folder, its manifest and decoder verified: all that a sampler needs of it.

    Raises InputError, naming the file and the cure.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        cure = "accelerate launch stage1_vae/encode.py --run RUN"
        raise InputError(f"{folder}: no saved latents here (or not all of them): {cure}")
    if not _is_manifest(manifest):
        raise InputError(f"{folder}: {MANIFEST} is not a manifest of latents; remove it and encode again")
    _, decoder = _shards_and_decoder(manifest["files"])
    _refuse_faults(folder, decoder)
    return Cache(folder, manifest)


def verify(folder: Path) -> None:
    """Raises InputError where a shard is not as it was written, naming it and the cure.

    A shard is read for this only where it was touched since it was verified last.
    """
    shards, _ = _shards_and_decoder(open_cache(folder).manifest["files"])
    doubtful = _not_remembered(folder, shards)
    if doubtful:
        _refuse_faults(folder, doubtful)
        _remember(folder, shards)


def _refuse_faults(folder: Path, files: dict[str, dict]) -> None:
    wrong = disk.faults(folder, files)
    if wrong:
        raise InputError(f"{folder}: {wrong[0]}; remove that file and {MANIFEST}, and encode again")


def _shards_and_decoder(files: dict[str, dict]) -> tuple[dict[str, dict], dict[str, dict]]:
    shards = {name: entry for name, entry in files.items() if name.split("/")[0] in SPLITS}
    return shards, {name: entry for name, entry in files.items() if name not in shards}


def _remember(folder: Path, shards: dict[str, dict]) -> None:
    """Note what was verified, and when it was last touched. A folder may be for reading only."""
    with contextlib.suppress(InputError):
        disk.write_json(folder / VERIFIED, {name: _seen(folder / name, shards[name]) for name in shards})


def _not_remembered(folder: Path, shards: dict[str, dict]) -> dict[str, dict]:
    try:
        known = json.loads((folder / VERIFIED).read_text())
        return {
            name: entry for name, entry in shards.items() if known.get(name) != _seen(folder / name, entry)
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return shards


def _seen(path: Path, entry: dict) -> list:
    """What tells that a file is the one that was verified. A copy has another time of change."""
    found = path.lstat()
    return [entry["sha256"], found.st_size, found.st_ctime_ns]


def _is_manifest(tree: Any) -> bool:
    """Whether a parsed JSON file has what a cache needs: shards of both splits, classes and statistics."""
    try:
        splits = {name.split("/")[0] for name in tree["files"]}
        whole = isinstance(tree["files"], dict) and isinstance(tree["classes"], list)
        return set(SPLITS) <= splits and tree["codec"].keys() == {"mean", "std"} and whole
    except (TypeError, KeyError, AttributeError):
        return False


class Latents(Dataset):
    """The moments and labels of one split, memory-mapped."""

    def __init__(self, shards: Sequence[Path], num_workers: int | None = None):
        self.shards = shards
        self.num_workers = num_workers
        self.moments = [shard.mapped(path, "moments") for path in shards]
        self.ends = np.cumsum([len(moments) for moments in self.moments])
        with safe_open(shards[0], framework="pt") as file:
            labelled = "label" in file.keys()  # noqa: SIM118 (not a dict)
        self.labels = torch.cat([shard.mapped(path, "label") for path in shards]) if labelled else None

    def __reduce__(self) -> tuple:  # a loader process maps the files, and is sent none of them
        return Latents, (self.shards,)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def called(self) -> np.ndarray:
        """What each position is called in a message: its row of the cache."""
        return np.arange(len(self))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c,h,w) of a latent."""
        channels, height, width = self.moments[0].shape[1:]
        return channels // 2, height, width

    def __getitems__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Moments (B,2c,h,w), in float32, and labels (B,)."""
        where = np.asarray(positions)
        number = np.searchsorted(self.ends, where, side="right")
        row = where - np.where(number > 0, self.ends[number - 1], 0)
        found = [self.moments[n][r] for n, r in zip(number, row, strict=True)]
        batch = {"moments": torch.stack(found).float()}
        if self.labels is not None:
            batch["label"] = self.labels[where]
        return batch
