"""A trained run, opened: its VAE, its images and its pipeline. Commands that look at a run begin here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from shared import disk
from shared.config import InputError
from shared.data import latents, sources, splits
from shared.recipe import Recipe
from shared.run import RunFolder, model_of, open_run
from shared.sampling.build import build_pipeline
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.transforms import LatentCodec, ValueTransform
from shared.training import checkpoint
from stage1_vae.pretrained import load_vae
from stage2_diffusion.config import Stage2Config

# ---------------------------------------------------------------- its VAE and its images


def open_vae(run: RunFolder, device: torch.device | str) -> tuple[Any, ValueTransform, Path]:
    """The averaged VAE of a run's newest stage-1 checkpoint, its value transform and that checkpoint."""
    newest = checkpoint.required(run.stage("stage1").checkpoints)
    vae = load_vae(newest / "vae").to(device).eval()
    return vae, ValueTransform.from_pretrained(newest / "value_transform"), newest


def open_images(
    run: RunFolder, recipe: Recipe, split: str | None = None
) -> tuple[splits.Pixels, splits.Pixels, str]:
    """The training images, those to measure a run on, and what these are called.

    Measured on are the held-out images, or another split, whole. Raises InputError where the run was trained
    on other images.
    """
    training, held_out = splits.split(sources.open_source(recipe.data), recipe.data)
    splits.check_images(run.stage("stage1").images, splits.identity(training, recipe.data), recipe.data)
    if split is None:
        return training, held_out, f"held out of {recipe.data.split}"
    source = sources.open_source(replace(recipe.data, split=split))
    if source.labels is not None and training.source.labels is not None:
        source.labels = _numbered_as(training.source.names, source.names)[source.labels]
        source.names = training.source.names
    return training, splits.whole(source), split


def _numbered_as(known: list[str], names: list[str]) -> np.ndarray:
    """The numbers, among known classes, of a split's own (K,), which may lack some; -1 of one unknown."""
    return np.array([known.index(name) if name in known else -1 for name in names])


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
    exported = (run.pipeline / "model_index.json").is_file()
    if found is not None and recipe.stage2:
        latents_are_gone = not (run.latents_of(recipe) / latents.MANIFEST).is_file()
        if latents_are_gone and exported and model_of(found) == model_of(run.pipeline):
            return open_exported(run.pipeline, dtype)
        return assemble(recipe, recipe.stage2, found, run, dtype)
    if found is not None:
        return LatentDiffusionPipeline.from_vae(found, dtype)
    if exported:  # the checkpoints were removed
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
