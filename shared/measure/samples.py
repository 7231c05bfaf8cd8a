"""Samples against held-out images: distances, memorisation, and a field's own statistics.

Dimension key: N images, C H W pixels in [-1, 1].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from shared import trained
from shared.config import InputError
from shared.data import batches, splits
from shared.data.augment import symmetries, transformed
from shared.data.config import DataConfig
from shared.data.latents import Cache, Latents
from shared.measure import features, fields
from shared.recipe import Recipe
from shared.run import RunFolder
from shared.sampling import tasks
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.transforms import ValueTransform
from shared.show import grids, plots
from stage2_diffusion.stage import Judge

BATCH = 64  # samples drawn at once
TRAINING_IMAGES = 10_000  # whose features are the floor, at most
NEIGHBOURS = 200_000  # training images among which a sample's nearest is looked for, at most
LEAST_IMAGES = 4  # that say something about samples
LEAST_VALIDATED = 16  # held-out latents of which a KID in training says something
OWN_IMAGES = 2000  # decoded training latents that a network of the data's own learns from, at most


def measure_samples(
    run: RunFolder,
    recipe: Recipe,
    vae: Any,
    transform: ValueTransform,
    training: splits.Pixels,
    part: splits.Pixels,
    count: int,
    seed: int,
    extractor_kind: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Samples, reconstructions and training images against held-out ones.

    Arguments:
        part: the images to measure on.
        count: samples to draw, and images to hold against them.
        seed: of the samples.
        extractor_kind: auto, inception or own.

    Raises:
        InputError: where there are too few images to say something.
    """
    device, sampling = accelerator.device, recipe.sampling
    pipe = trained.open_pipeline(run.path).to(device)
    classes = pipe.config.classes
    seen, seen_labels = trained.pixels(training, transform, TRAINING_IMAGES)
    x, labels = trained.pixels(part, transform, count)
    if min(len(x), len(seen)) < LEAST_IMAGES:
        cure = f"at least {LEAST_IMAGES} are needed (or --split NAME)"
        raise InputError(f"data.val_fraction: {len(x)} held-out images say nothing about samples; {cure}")
    extractor = features.choose(extractor_kind, trained.are_photographs(training), seen, seen_labels, device)
    drawn_labels = tasks.labels_like(seen_labels, classes, count)
    noise = pipe.noises(seed, count)
    values, drawn = tasks.sample(
        pipe, noise, drawn_labels, sampling.guidance_scale, sampling.num_steps, BATCH, accelerator
    )
    x_hat = trained.decode(vae, trained.encode(vae, x, device)[0], device)
    floor = seen[splits.evenly(len(seen), len(drawn))]
    real = extractor.all(x, device, "held-out images")
    of_samples = extractor.all(drawn, device, "samples")
    of_training = extractor.all(floor, device, "training images")
    result: dict[str, Any] = {
        "extractor": extractor.name,
        "real_images": len(x),
        "generated_images": len(drawn),
        "floor_images": len(floor),
        "samples": features.distances(of_samples, real),
        "rfid": features.fid(extractor.all(x_hat, device, "reconstructions"), real),
        "training_against_held_out": features.distances(of_training, real),
        "memorisation": memorisation(run.report, drawn, x, training, transform, accelerator),
    }
    if not transform.integer and recipe.data.channels > 1:
        result["channels"] = of_channels(training.source.channel_names, values, transform.inverse(x))
    if recipe.data.field:
        result["statistics"] = statistics(
            run.report, recipe.data.field, values, drawn_labels, transform.inverse(x), labels, classes
        )
    return result


def of_channels(names: Sequence[str], drawn: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    """Mean and deviation of each channel in its own units, of samples and of held-out images (N,C,H,W)."""
    both = {"samples": drawn, "held_out": real}
    return {what: fields.moments(values.numpy(), names) for what, values in both.items()}


def judge(
    extractor: features.Extractor,
    real: features.Features,
    labels: torch.Tensor | None,
    count: int,
    seed: int,
    guidance_scale: float,
    num_steps: int,
    accelerator: Accelerator,
) -> Judge:
    """How far samples of a pipeline, always of the same noise, are from images whose features are `real`."""

    def distances(pipe: LatentDiffusionPipeline) -> dict[str, float]:
        noise = pipe.noises(seed, count)
        _, drawn = tasks.sample(pipe, noise, labels, guidance_scale, num_steps, BATCH, accelerator)
        ours = extractor.all(drawn, accelerator.device, "samples")
        return features.distances(ours, real)

    return distances


def judge_in_training(
    count: int, recipe: Recipe, cache: Cache, decoder: LatentDiffusionPipeline, accelerator: Accelerator
) -> Judge:
    """What a validation of stage 2 asks about `count` samples.

    They are held against decoded held-out latents: no image is needed, and what the VAE loses is in both. The
    Inception is taken where values are grey levels of photographs, else a network of the data's own.

    Raises:
        InputError: where too few latents are held out.
    """
    held_out, training = cache.split("val"), cache.split("train")
    if len(held_out) < LEAST_VALIDATED:
        cure = f"KID needs {LEAST_VALIDATED} (data.val_fraction), or say 0"
        raise InputError(f"stage2.validate_samples: only {len(held_out)} latents are held out; {cure}")
    device, sampling = accelerator.device, recipe.sampling
    x, _ = _decoded(held_out, count, decoder, device)
    seen, seen_labels = _decoded(training, OWN_IMAGES, decoder, device)
    photographs = decoder.config.value_transform["integer"] and recipe.data.source != "digits"
    extractor = features.choose("auto", photographs, seen, seen_labels, device)
    real = extractor.all(x, device, "held-out latents")
    labels = tasks.labels_like(seen_labels, cache.classes, count)
    scale, steps = sampling.guidance_scale, sampling.num_steps
    return judge(extractor, real, labels, count, recipe.seed, scale, steps, accelerator)


def _decoded(
    part: Latents, most: int, decoder: LatentDiffusionPipeline, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `most` latents of a split, evenly taken, as pixels (N,C,H,W), and their labels (N,)."""
    batch = part.__getitems__(splits.evenly(len(part), most))
    mean, _ = batch["moments"].chunk(2, dim=1)
    return trained.decode(decoder.vae, mean, device), batch.get("label")


def memorisation(
    report: Path,
    drawn: torch.Tensor,
    x: torch.Tensor,
    training: splits.Pixels,
    transform: ValueTransform,
    accelerator: Accelerator,
) -> dict[str, float]:
    """How near samples are to their nearest training image, beside how near held-out images are.

    Draws the nearest pairs. drawn, x: samples and held-out images, (N,C,H,W).
    """
    rows = splits.evenly(len(training), NEIGHBOURS)
    parts = batches.in_order(training, rows, 256, accelerator)
    seen = torch.cat([features.shrunk(transform(batch["raw"])) for batch in parts])
    targets = under_symmetries(seen, training.source.data)
    distance, places = features.nearest(features.shrunk(drawn), targets)
    usual, _ = features.nearest(features.shrunk(x), targets)
    closest = distance.argsort()[:8]
    copied = training.__getitems__([rows[place % len(rows)] for place in places[closest].tolist()])
    tiles = torch.cat([drawn[closest], transform(copied["raw"])])
    grids.grid(tiles, len(closest)).save(report / "nearest.png")
    return {
        "training_images": len(rows),
        "samples_to_training": distance.median().item(),
        "held_out_to_training": usual.median().item(),
        "share_nearer_than_99_percent_of_held_out": (distance < usual.quantile(0.01)).float().mean().item(),
    }


def under_symmetries(shrunk: torch.Tensor, data: DataConfig) -> torch.Tensor:
    """Shrunk images (M,D) and what augmentation's S symmetries make of them, (S M,D).

    A mirror image of a training image is a copy of it where training mirrored it.
    """
    images = shrunk.unflatten(1, (data.channels, *features.shrunk_size(*data.size)))
    table = symmetries(data.augment.flip, shrunk.device)
    return torch.cat([transformed(images, one.expand(len(images), -1)).flatten(1) for one in table])


def statistics(
    report: Path,
    field: str,
    generated: torch.Tensor,
    drawn_labels: torch.Tensor | None,
    real: torch.Tensor,
    labels: torch.Tensor | None,
    classes: Sequence[str],
) -> dict[str, dict]:
    """The field's statistics of generated against real values (N,C,H,W): of all, and of each class alone."""
    ours, theirs = generated.numpy(), real.numpy()
    tables = {"all": fields.compare(field, ours, theirs)}
    if drawn_labels is not None and labels is not None:
        for number, name in enumerate(classes):
            one, other = ours[(drawn_labels == number).numpy()], theirs[(labels == number).numpy()]
            if min(len(one), len(other)) >= LEAST_IMAGES:
                tables[name] = fields.compare(field, one, other)
    _draw_statistics(report / "statistics.png", field, ours, theirs)
    return tables


def _draw_statistics(path: Path, field: str, generated: np.ndarray, real: np.ndarray) -> None:
    (scalars, curves), (real_scalars, real_curves) = (
        fields.FIELDS[field](generated),
        fields.FIELDS[field](real),
    )
    figure = plots.statistics(
        {name: (found, real_scalars[name]) for name, found in scalars.items()},
        {name: (found, real_curves[name]) for name, found in curves.items()},
    )
    figure.savefig(path)
