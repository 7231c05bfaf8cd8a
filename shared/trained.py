"""A trained run, opened: its VAE, its images and its pipeline. Commands that look at a run begin here.

Dimension key: N images, C H W pixels, c h w latents.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from shared import disk
from shared.config import InputError
from shared.data import latents, sources, splits
from shared.data.config import DataConfig, inspect_source
from shared.recipe import Recipe
from shared.run import RunFolder, open_run
from shared.sampling.build import build_pipeline
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.transforms import LatentCodec, ValueTransform
from shared.training import checkpoint
from stage1_vae.pretrained import load_vae
from stage2_diffusion.config import Stage2Config

BATCH = 64  # images that a network is shown at once
MOST_VALUES = 2**28  # of pixels in memory: a GiB
MOST_PIXELS = 2**20  # of a batch, which a VAE at full size makes a hundred channels of


# ---------------------------------------------------------------- its VAE and its images


def open_vae(run: RunFolder, device: torch.device | str) -> tuple[Any, ValueTransform, Path]:
    """The averaged VAE of a run's newest stage-1 checkpoint, its value transform and that checkpoint."""
    newest = checkpoint.required(run.stage("stage1").checkpoints)
    vae = load_vae(newest / "vae").to(device).eval()
    return vae, ValueTransform.from_pretrained(newest / "value_transform"), newest


@torch.inference_mode()
def encode(vae: Any, x: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, each (N,c,h,w), of pixels (N,C,H,W), a batch at a time."""
    mean, logvar = zip(*(vae.moments(part.to(device)) for part in x.split(BATCH)), strict=True)
    return torch.cat(mean).float().cpu(), torch.cat(logvar).float().cpu()


@torch.inference_mode()
def decode(vae: Any, z: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Pixels (N,C,H,W) of latents (N,c,h,w), a batch at a time."""
    return torch.cat([vae.decode(part.to(device)).sample.float().cpu() for part in z.split(BATCH)])


def open_images(recipe: Recipe, split: str | None = None) -> tuple[splits.Pixels, splits.Pixels, str]:
    """The training images, those to measure a run on, and what these are called.

    Measured on are the held-out images, or another split, whole.
    """
    training, held_out = splits.split(sources.open_source(recipe.data), recipe.data)
    if split is None:
        return training, held_out, f"held out of {recipe.data.split}"
    wanted = replace(recipe.data, split=split)
    inspect_source(wanted)
    return training, splits.whole(sources.open_source(wanted)), split


def pixels(
    part: splits.Pixels, transform: ValueTransform, count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `count` images of a split, evenly taken, as pixels (N,C,H,W) in [-1, 1], and their labels (N,).

    Fewer where they would need more than a GiB.
    """
    data = part.source.data
    most = max(BATCH, MOST_VALUES // (data.channels * data.height * data.width))
    rows = splits.evenly(len(part), min(count, most))
    x = torch.empty(len(rows), data.channels, *data.size)  # parts that are joined would be there twice
    labels = []
    for first, batch in zip(range(0, len(rows), BATCH), splits.read(part, rows, BATCH), strict=True):
        x[first : first + BATCH] = transform(batch["raw"])
        if "label" in batch:
            labels.append(batch["label"])
    return x, torch.cat(labels) if labels else None


def batch_size(data: DataConfig) -> int:
    """Images that are decoded at once: BATCH, fewer from 128 px on."""
    return max(4, min(BATCH, MOST_PIXELS // (data.height * data.width)))


def are_photographs(part: splits.Pixels) -> bool:
    """Whether the Inception has something to say: 8-bit images that are not scikit-learn's digits."""
    return part.source.integer and part.source.data.source != "digits"


# ---------------------------------------------------------------- its pipeline


def open_pipeline(
    path: Path, which: str = "newest", dtype: torch.dtype | None = None
) -> LatentDiffusionPipeline:
    """The pipeline of an exported folder, or of a run from its checkpoints, finished or not.

    Arguments:
        path: of the folder or the run.
        which: newest, or best: the checkpoint of the last stage that validated best.
        dtype: of the networks; None: as they were saved.
    """
    if (path / "model_index.json").is_file():
        if which == "best":
            raise InputError(f"--checkpoint: {path} is an exported pipeline; it holds one")
        return open_exported(path, dtype)
    run, recipe = open_run(path)
    checkpoints = run.stage("stage2" if recipe.stage2 else "stage1").checkpoints
    found = checkpoint.best(checkpoints) if which == "best" else checkpoint.newest(checkpoints)
    if found is not None and recipe.stage2:
        return assemble(recipe, recipe.stage2, found, run, dtype)
    if found is not None:
        return LatentDiffusionPipeline.from_vae(found, dtype)
    if (run.pipeline / "model_index.json").is_file():  # the checkpoints were removed
        return open_exported(run.pipeline, dtype)
    raise InputError(f"{path}: nothing to sample from yet: train its last stage first")


def open_exported(folder: Path, dtype: torch.dtype | None = None) -> LatentDiffusionPipeline:
    """An exported pipeline, verified against its manifest. Raises InputError."""
    wrong = disk.faults(folder)
    if wrong:
        cure = "restore it from a copy, or export it anew by running its last train command again"
        raise InputError(f"{folder}: {wrong[0]}; {cure}")
    try:
        return LatentDiffusionPipeline.from_pretrained(folder, dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{folder}: not a pipeline of this stack ({' '.join(str(error).split())[:200]})"
        ) from None


def assemble(
    recipe: Recipe, stage2: Stage2Config, found: Path, run: RunFolder, dtype: torch.dtype | None = None
) -> LatentDiffusionPipeline:
    """The pipeline of a stage-2 checkpoint and the latents that it was trained on."""
    folder = run.latents_of(recipe)
    cache = latents.open_cache(folder)
    codec = LatentCodec.from_pretrained(found / "codec")
    if codec.config != cache.manifest["codec"]:
        raise InputError(f"{found} was trained on other latents than {folder}")
    names = ("unet", "guide") if stage2.guide_at else ("unet",)
    networks = {name: disk.load_module(UNet2DModel, found / name, dtype) for name in names}
    decoder = LatentDiffusionPipeline.from_vae(folder, dtype)
    return build_pipeline(decoder, networks, codec, cache.classes, stage2.objective, recipe.sampling)
