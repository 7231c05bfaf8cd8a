"""Saved latents: shards of moments on disk, their statistics and their fingerprint; and the data set stage 2 trains on.

A cache folder holds fingerprint.json, written first; {train,val}/00000.safetensors ... with `moments` (N,2c,h,w) float32 =
[mean, logvar] and, where the images have classes, `label` (N,) int64; vae/ and value_transform/, so that what stage 2
makes can be decoded; and manifest.json, written last. Refuses to know how a VAE computes.
Dimension key: N images, c h w latents.
"""

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from shared.config import InputError, differences
from shared.disk import faults, map_tensor, read_json, sha256, write_file, write_json

SHARD = 4096  # images in one shard
MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"


# ---------------------------------------------------------------- the fingerprint: what the latents were made of


def fingerprint(checkpoint: Path, data: dict[str, dict]) -> dict:
    """What latents depend on: the VAE's weights and the value transform of a checkpoint, and the identity of the data."""
    files = sorted(p for name in ("vae", "value_transform") for p in (checkpoint / name).iterdir())
    made_by = {f"{p.parent.name}/{p.name}": sha256(p)[:32] for p in files}
    return {"made by": made_by, "data": data}


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a finished cache; None where there is none."""
    return read_json(folder / MANIFEST)


def read_fingerprint(folder: Path) -> dict | None:
    return read_json(folder / FINGERPRINT)


def refuse_if_stale(folder: Path, wanted: dict) -> None:
    """Raises InputError if the folder holds latents of another VAE, other data or another value transform."""
    found = read_fingerprint(folder)
    if found is None and any(folder.glob("*/*.safetensors")):
        raise InputError(f"{folder} does not say what its latents were made of; remove the folder and encode again")
    if found is not None and (changed := differences(found, wanted)):
        raise InputError(f"{folder} is stale, it was made with: {'; '.join(changed)}; remove the folder and encode again")


# ---------------------------------------------------------------- writing


def begin(folder: Path, wanted: dict) -> None:
    """Claim a folder for the latents of a fingerprint; an interrupted cache of the same fingerprint goes on."""
    refuse_if_stale(folder, wanted)
    write_json(folder / FINGERPRINT, wanted)


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / split / f"{number:05d}.safetensors"


def write_shard(path: Path, moments: torch.Tensor, labels: torch.Tensor | None) -> None:
    """One shard, whole or not at all."""
    tensors = {"moments": moments.float().contiguous()} | ({} if labels is None else {"label": labels})

    def write(temporary: Path) -> None:
        save_file(tensors, temporary)
        temporary.chmod(0o644)

    write_file(path, write)


def shard_is_whole(path: Path, images: int) -> bool:
    """Whether an earlier, interrupted run left this shard complete (it is renamed into place only then)."""
    try:
        return len(map_tensor(path, "moments")) == images
    except InputError:
        return False


def finish(folder: Path, checkpoint: Path, per_element: bool, classes: list[str]) -> dict:
    """Copy the decoder beside the latents, measure their statistics and write the manifest."""
    for name in ("vae", "value_transform"):
        for file in sorted((checkpoint / name).iterdir()):
            write_file(folder / name / file.name, functools.partial(shutil.copyfile, file))
    shards = sorted(p for s in ("train", "val") for p in (folder / s).glob("*.safetensors"))
    mean, std = statistics([p for p in shards if p.parent.name == "train"], per_element)
    files = [*shards, *(p for name in ("vae", "value_transform") for p in sorted((folder / name).iterdir()))]
    manifest = {
        "format": 1,
        "files": {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files},
        "classes": classes,
        "codec": {"mean": mean.float().tolist(), "std": std.float().tolist()},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def statistics(shards: list[Path], per_element: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of z ~ q(z|x) over all images, by the law of total variance: Var(mean) + E[sigma^2].

    One number per channel, (c,1,1), or per element, (c,h,w). A single pass in double precision.
    """
    axes = (0,) if per_element else (0, 2, 3)
    count, first, second = 0, 0.0, 0.0
    for path in shards:
        for block in map_tensor(path, "moments").split(256):
            mean, logvar = block.double().chunk(2, dim=1)
            count += len(block) * (1 if per_element else mean[0, 0].numel())
            first = first + mean.sum(axes, keepdim=True)[0]
            second = second + (mean.square() + logvar.exp()).sum(axes, keepdim=True)[0]
    average = first / count
    return average, (second / count - average.square()).clamp_min(1e-12).sqrt()


# ---------------------------------------------------------------- reading


@dataclass
class Cache:
    """A finished folder of latents, opened."""

    folder: Path
    manifest: dict

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    def split(self, name: str) -> "Latents":
        return Latents([self.folder / file for file in sorted(self.manifest["files"]) if file.startswith(f"{name}/")])


def open_cache(folder: Path) -> Cache:
    """The cache in a folder, every shard verified. Raises InputError, naming the shard and the cure."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no saved latents here (or not all of them): accelerate launch stage1_vae/encode.py --run RUN")
    if not _is_manifest(manifest):
        raise InputError(f"{folder}: {MANIFEST} is not a manifest of latents; remove it and encode again")
    if wrong := faults(folder, manifest["files"]):
        raise InputError(f"{folder}: {wrong[0]}; remove that file and {MANIFEST}, and encode again")
    return Cache(folder, manifest)


def _is_manifest(tree) -> bool:
    """Whether a file that parsed as JSON says what a cache needs: shards of both splits, classes and statistics."""
    try:
        splits = {name.split("/")[0] for name in tree["files"]}
        return {"train", "val"} <= splits and tree["codec"].keys() == {"mean", "std"} and isinstance(tree["classes"], list)
    except (TypeError, KeyError, AttributeError):
        return False


class Latents(Dataset):
    """The moments and labels of one split, memory-mapped."""

    num_workers = 0  # a row is copied faster than another process could be asked for it

    def __init__(self, shards: list[Path]):
        self.moments = [map_tensor(path, "moments") for path in shards]
        self.ends = np.cumsum([len(m) for m in self.moments])
        with safe_open(shards[0], framework="pt") as file:
            labelled = "label" in file.keys()  # noqa: SIM118 (not a dict)
        self.labels = torch.cat([map_tensor(path, "label") for path in shards]) if labelled else None

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def indices(self) -> np.ndarray:
        """What each position is called in a message: its row of the cache."""
        return np.arange(len(self))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c,h,w) of a latent."""
        channels, height, width = self.moments[0].shape[1:]
        return channels // 2, height, width

    def __getitems__(self, positions) -> dict[str, torch.Tensor]:
        """Moments (B,2c,h,w) and labels (B,)."""
        positions = np.asarray(positions)
        shard = np.searchsorted(self.ends, positions, side="right")
        row = positions - np.where(shard > 0, self.ends[shard - 1], 0)
        moments = torch.stack([self.moments[s][r] for s, r in zip(shard, row, strict=True)])
        return {"moments": moments} | ({} if self.labels is None else {"label": self.labels[positions]})
