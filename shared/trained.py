"""A trained run, opened: its VAE, its pipeline, its samples. What every command that looks at a run begins with.

Dimension key: N images, C H W pixels, c h w latents.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import UNet2DModel
from tqdm import tqdm

from shared import disk
from shared.config import InputError
from shared.data import latents, sources, splits
from shared.data.config import inspect_source
from shared.run import open_run
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler
from shared.sampling.transforms import LatentCodec, ValueTransform
from shared.training import checkpoint
from stage1_vae.model import DeepVAE


def open_vae(run: Path, device):
    """The averaged VAE of a run's newest stage-1 checkpoint, its value transform and that checkpoint."""
    newest = checkpoint.required(run / "stage1_vae" / "checkpoints")
    vae = disk.load_module(DeepVAE, newest / "vae").to(device).eval()
    return vae, ValueTransform.from_pretrained(newest / "value_transform"), newest


@torch.inference_mode()
def encode(vae, x: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, each (N,c,h,w), of pixels (N,C,H,W), 64 at a time."""
    mean, logvar = zip(*(vae.moments(part.to(device)) for part in x.split(64)), strict=True)
    return torch.cat(mean).float().cpu(), torch.cat(logvar).float().cpu()


@torch.inference_mode()
def decode(vae, z: torch.Tensor, device) -> torch.Tensor:
    """Pixels (N,C,H,W) of latents (N,c,h,w), 64 at a time."""
    return torch.cat([vae.decode(part.to(device)).sample.float().cpu() for part in z.split(64)])


def open_images(recipe, split: str | None = None):
    """The training images, those to measure a run on, and what these are called: the held-out ones, or another split, whole."""
    training, held_out = splits.split(sources.open_source(recipe.data), recipe.data)
    if split is None:
        return training, held_out, f"held out of {recipe.data.split}"
    wanted = replace(recipe.data, split=split)
    inspect_source(wanted)
    return training, splits.whole(sources.open_source(wanted)), split


def pixels(part, transform, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `count` images of a split, evenly taken, as pixels (N,C,H,W) in [-1, 1], and their labels (N,); fewer where
    they would need more than a GiB."""
    one = part.source.data
    rows = splits.evenly(len(part), min(count, max(64, 2**28 // (one.channels * one.image_size**2))))
    batches = [part.__getitems__(rows[start : start + 64]) for start in range(0, len(rows), 64)]
    labels = [batch["label"] for batch in batches if "label" in batch]
    return torch.cat([transform(batch["raw"]) for batch in batches]), torch.cat(labels) if labels else None


def are_photographs(part) -> bool:
    """Whether the Inception has something to say: 8-bit images that are not scikit-learn's digits."""
    return part.source.integer and part.source.data.source != "digits"


def open_pipeline(path: Path):
    """The pipeline of an exported folder, or of a run: put together from its newest checkpoints, finished or not."""
    if (path / "model_index.json").is_file():
        return open_exported(path)
    _, recipe = open_run(path)
    stage = "stage2_diffusion" if recipe.stage2 else "stage1_vae"
    newest = checkpoint.newest(path / stage / "checkpoints")
    if newest and recipe.stage2:
        return assemble(recipe, newest, Path(recipe.stage2.latents or path / "latents").expanduser())
    if newest:
        return LatentDiffusionPipeline.from_vae(newest)
    if (path / "pipeline" / "model_index.json").is_file():  # the checkpoints were removed
        return open_exported(path / "pipeline")
    raise InputError(f"{path}: nothing to sample from yet: train its last stage first")


def open_exported(folder: Path):
    """An exported pipeline, verified against its manifest. Raises InputError."""
    if wrong := disk.faults(folder):
        raise InputError(f"{folder}: {wrong[0]}; restore it from a copy, or export it anew by running its last train command again")
    try:
        return LatentDiffusionPipeline.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder}: not a pipeline of this stack ({' '.join(str(error).split())[:200]})") from None


def assemble(recipe, newest: Path, folder: Path):
    """The pipeline of a stage-2 checkpoint and the latents that it was trained on."""
    cache = latents.open_cache(folder)
    codec = LatentCodec.from_pretrained(newest / "codec").config
    if codec != cache.manifest["codec"]:
        raise InputError(f"{newest} was trained on other latents than {folder}")
    decoder = LatentDiffusionPipeline.from_vae(folder)
    names = ("unet", "guide") if recipe.stage2.guide_at else ("unet",)
    networks = {name: disk.load_module(UNet2DModel, newest / name) for name in names}
    scheduler = make_scheduler(recipe.stage2.objective, recipe.sampling.sampler)
    return LatentDiffusionPipeline(
        decoder.vae, **networks, scheduler=scheduler, codec=codec, value_transform=decoder.config.value_transform,
        classes=cache.classes, guidance_interval=recipe.sampling.guidance_interval,
    )  # fmt: skip


def choose_labels(label: str | None, classes: list[str], count: int):
    """Classes (count,) as a tensor: the one asked for, or all in turn; None where there are none."""
    if label is None:
        return torch.arange(count) % len(classes) if classes else None
    if not classes:
        raise InputError(f"--label {label}: this model was trained without classes")
    if label not in classes and not (label.isdecimal() and int(label) < len(classes)):
        raise InputError(f"--label: no class {label!r}; there are {', '.join(classes)} (or 0 to {len(classes) - 1})")
    return torch.full((count,), classes.index(label) if label in classes else int(label))


def labels_like(seen: torch.Tensor | None, classes: list[str], count: int):
    """Classes (count,) as frequent as in the training images (N,), so that samples can be held against real images."""
    if seen is None or not classes:
        return choose_labels(None, classes, count)
    return seen[torch.linspace(0, len(seen) - 1, count).long()]


def sample(pipe, noise, labels, guidance_scale: float, num_steps: int, batch_size: int, state):
    """Values and pixels (N,C,H,W) for noise (N,c,h,w) on the first process; each process computes whole batches."""
    pipe.set_progress_bar_config(disable=True)
    starts = range(0, len(noise), batch_size)
    mine = []
    with tqdm(total=len(noise), unit="img", desc="sampling", disable=not state.is_main_process) as bar:
        for start in starts[state.process_index :: state.num_processes]:
            rows = slice(start, start + batch_size)
            out = pipe(noise[rows], None if labels is None else labels[rows], guidance_scale, num_steps)
            mine.append((start, torch.from_numpy(out.values), out.pixels.cpu()))
            bar.update(min(len(out.pixels) * state.num_processes, bar.total - bar.n))
    parts = sorted(gather_object(mine), key=lambda part: part[0])
    return torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
