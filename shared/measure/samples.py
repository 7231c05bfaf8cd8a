"""Samples against held-out images: distances, memorisation, and a field's own statistics.

Dimension key: N images, C H W pixels in [-1, 1].
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from shared import trained
from shared.config import InputError
from shared.data import batches, splits
from shared.data.augment import shifted, symmetries, transformed
from shared.data.config import DataConfig
from shared.data.latents import Cache, Latents
from shared.measure import features, fields, images
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
CLOSELY = 10_000  # training images, up to which copies are looked for among half shifts, too
# Share of samples nearer to training images than 99 % of held-out ones, and in terms of what chance gives.
COPIES, OF_CHANCE = 0.1, 5
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
    seen_rows = splits.evenly(len(training), TRAINING_IMAGES)
    if min(len(part), len(seen_rows)) < LEAST_IMAGES:
        cure = f"at least {LEAST_IMAGES} are needed (or --split NAME)"
        raise InputError(f"data.val_fraction: {len(part)} held-out images say nothing about samples; {cure}")
    extractor = _extractor(extractor_kind, training, transform, device)
    in_units = bool(recipe.data.field) or (not transform.integer and recipe.data.channels > 1)
    size = images.batch_size(recipe.data)
    drawn_labels = tasks.labels_like(training.labels(seen_rows), classes, count)
    noise = pipe.noises(seed, count)
    settings = (sampling.guidance_scale, sampling.num_steps, size, accelerator)
    parts = tasks.drawn(pipe, noise, drawn_labels, *settings)
    drawn = _of_samples(extractor, parts, count, drawn_labels, in_units, device)
    rows = splits.evenly(len(part), count)
    real, of_vae = _of_images(extractor, vae, transform, part, rows, size, in_units, device)
    floor_rows = [seen_rows[row] for row in splits.evenly(len(seen_rows), len(drawn))]
    floor, _ = _of_images(extractor, None, transform, training, floor_rows, size, False, device)
    copies, closest, places = memorisation(drawn.small, real.small, training, transform, accelerator)
    copied = training.__getitems__(places)["raw"]
    some = None if drawn_labels is None else drawn_labels[closest]
    _, again = tasks.gathered(tasks.drawn(pipe, noise[closest], some, *settings))  # pixels were not kept
    shown = grids.pictures(torch.cat([again, transform(copied)]), transform.integer)
    grids.grid(shown, len(closest)).save(run.report / "nearest.png")
    result: dict[str, Any] = {
        "extractor": extractor.name,
        "real_images": len(real),
        "generated_images": len(drawn),
        "floor_images": len(floor),
        "samples": features.distances(drawn.found, real.found),
        "rfid": features.fid((of_vae, None), real.found),
        "training_against_held_out": features.distances(floor.found, real.found),
        "memorisation": copies,
    }
    names = training.source.channel_names
    return result | _of_values(run.report, recipe.data, names, drawn, real, classes)


def _extractor(
    kind: str, training: splits.Pixels, transform: ValueTransform, device: torch.device
) -> features.Extractor:
    def seen() -> tuple[torch.Tensor, torch.Tensor | None]:
        unlabelled = training.source.labels is None  # random convolutions: only channels are asked for
        return images.pixels(training, transform, 1 if unlabelled else TRAINING_IMAGES)

    channels = training.source.data.channels
    return features.choose(kind, images.are_photographs(training), channels, seen, device)


def _of_values(
    report: Path,
    data: DataConfig,
    names: Sequence[str],
    drawn: features.Seen,
    real: features.Seen,
    classes: Sequence[str],
) -> dict[str, Any]:
    """What is measured in the data's own units, of samples against held-out images."""
    found: dict[str, Any] = {}
    if drawn.values is None or real.values is None:
        return found
    if data.channels > 1 and real.values.dtype != torch.uint8:
        found["channels"] = of_channels(names, drawn.values, real.values)
    if data.field:
        found["statistics"] = statistics(report, data.field, names, drawn, real, classes)
    return found


def _of_samples(
    extractor: features.Extractor,
    parts: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
    count: int,
    labels: torch.Tensor | None,
    in_units: bool,
    device: torch.device,
) -> features.Seen:
    """What is kept of `count` samples of some classes (N,), drawn by all processes."""
    kept = features.Kept(count)
    mine: list[int] = []  # rows of this process
    for start, values, pixels in parts:
        mine.extend(range(start, start + len(pixels)))
        kept.add(features.look(extractor, pixels, device, values if in_units else None))
    found = gather_object([(mine, kept.all())] if mine else [])
    order = torch.tensor([row for rows, _ in found for row in rows]).argsort()
    return replace(features.joined([seen for _, seen in found], order), labels=labels)


def _of_images(
    extractor: features.Extractor,
    vae: Any,
    transform: ValueTransform,
    part: splits.Pixels,
    rows: Sequence[int],
    size: int,
    in_units: bool,
    device: torch.device,
) -> tuple[features.Seen, torch.Tensor]:
    """What is kept of images, and the features (N,F) of their reconstructions by a VAE (None: their own)."""
    kept, of_vae = features.Kept(len(rows)), images.Rows(len(rows))
    with tqdm(total=len(rows), unit="img", desc="features of images", leave=False) as bar:
        for batch in splits.read(part, rows, size):
            x = transform(batch["raw"])
            values = transform.inverse(x) if in_units else None
            kept.add(features.look(extractor, x, device, values, batch.get("label")))
            if vae is not None:
                x_hat = images.decode(vae, images.encode(vae, x, device)[0], device)
                of_vae.add(extractor(x_hat.to(device))[0])
            bar.update(len(x))
    seen = kept.all()
    return seen, seen.features if vae is None else of_vae.all()


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
        parts = tasks.drawn(pipe, noise, labels, guidance_scale, num_steps, BATCH, accelerator)
        mine = [(start, extractor(pixels.to(accelerator.device))) for start, _, pixels in parts]
        ordered = sorted(gather_object(mine), key=lambda part: part[0])
        return features.distances(features.together([found for _, found in ordered]), real)

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
    assert recipe.stage2 is not None  # it trains
    recipe.stage2.check_held_out(len(held_out))
    device, sampling = accelerator.device, recipe.sampling
    x, _ = _decoded(held_out, count, decoder, device)
    seen, seen_labels = _decoded(training, OWN_IMAGES, decoder, device)
    photographs = decoder.config.value_transform["integer"] and recipe.data.source != "digits"
    known = (seen, seen_labels)
    extractor = features.choose("auto", photographs, recipe.data.channels, lambda: known, device)
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
    return images.decode(decoder.vae, mean, device), batch.get("label")


def memorisation(
    drawn: torch.Tensor,
    held_out: torch.Tensor,
    training: splits.Pixels,
    transform: ValueTransform,
    accelerator: Accelerator,
) -> tuple[dict[str, float], torch.Tensor, list[int]]:
    """How near samples are to their nearest training image, beside how near held-out images are.

    Arguments:
        drawn: samples, shrunk, (N,D).
        held_out: images, shrunk, (M,D).
        training: among these the nearest are looked for.
        transform: of their values.
        accelerator: for their loaders.

    Returns:
        The figures; the rows of the eight samples that are nearest to a training image; where these stand.
    """
    rows = splits.evenly(len(training), NEIGHBOURS)
    seen = images.Rows(len(rows))
    for batch in batches.in_order(training, rows, images.batch_size(training.source.data), accelerator):
        seen.add(features.shrunk(transform(batch["raw"])))
    distance, places = nearest_of(drawn, seen.all(), training.source.data)
    usual, _ = nearest_of(held_out, seen.all(), training.source.data)
    closest = distance.argsort()[:8]
    figures = {"training_images": len(rows)} | nearness(distance, usual)
    return figures, closest, [rows[place] for place in places[closest].tolist()]


def nearness(distance: torch.Tensor, usual: torch.Tensor) -> dict[str, float]:
    """What the distances of samples (N,) and held-out images (M,) to their nearest training image say.

    by_chance: the share that is to be expected of samples such as held-out images: more than 0.01 where
    these are few, for of a hundredth of them nothing is left but the least.
    """
    return {
        "samples_to_training": distance.median().item(),
        "held_out_to_training": usual.median().item(),
        "share_nearer_than_99_percent_of_held_out": (distance < usual.quantile(0.01)).float().mean().item(),
        "by_chance": (1 + 0.01 * (len(usual) - 1)) / (len(usual) + 1),
    }


def told_of_copies(found: dict[str, Any]) -> str | None:
    """A line where many of the samples are copies of training images: FID and KID fall with them."""
    figures = found.get("memorisation")
    if figures is None:
        return None
    share = figures["share_nearer_than_99_percent_of_held_out"]
    if share < max(COPIES, OF_CHANCE * figures["by_chance"]):
        return None
    what = f"{share:.0%} of the samples are nearer to a training image than 99 % of held-out ones are"
    return f"note: {what} (report/nearest.png); FID, KID and precision praise copies"


def nearest_of(
    x: torch.Tensor, training: torch.Tensor, data: DataConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """As features.nearest, among training images as they are, under augmentation's symmetries and shifted.

    A mirror image of a training image is a copy of it where training mirrored it. The inverse of a symmetry
    is another one, and that of a shift is a shift, but for the edge; so it is the few images (N,D) that are
    moved, not all of training (M,D). Among many training images fewer shifts are looked at.
    """
    sides = features.shrunk_size(*data.size)
    planes = x.unflatten(1, (data.channels, *sides))
    far = [round(data.augment.shift * small / side) for small, side in zip(sides, data.size, strict=True)]
    halves = (-2, -1, 0, 1, 2) if len(training) <= CLOSELY else (-2, 0, 2)
    offsets = itertools.product(*({most * half // 2 for half in halves} for most in far))
    found = []
    for one, offset in itertools.product(symmetries(data.augment.flip, x.device), offsets):
        turned = transformed(planes, one.expand(len(x), -1))
        moved = shifted(turned, torch.tensor([offset]).expand(len(x), -1))
        found.append(features.nearest(moved.flatten(1), training))
    distances, places = (torch.stack(parts) for parts in zip(*found, strict=True))
    least = distances.min(dim=0)
    return least.values, places.gather(0, least.indices[None])[0]


def statistics(
    report: Path,
    field: str,
    names: Sequence[str],
    drawn: features.Seen,
    real: features.Seen,
    classes: Sequence[str],
) -> dict[str, dict]:
    """The field's statistics of the values of both: of all, and of each class alone. Draws them."""
    assert drawn.values is not None and real.values is not None
    ours, theirs = drawn.values.numpy(), real.values.numpy()
    tables = {"all": fields.compare(field, ours, theirs, names)}
    if drawn.labels is not None and real.labels is not None:
        for number, name in enumerate(classes):
            one, other = ours[(drawn.labels == number).numpy()], theirs[(real.labels == number).numpy()]
            if min(len(one), len(other)) >= LEAST_IMAGES:
                tables[name] = fields.compare(field, one, other, names)
    _draw_statistics(
        report / "statistics.png", fields.of_field(field, ours, names), fields.of_field(field, theirs, names)
    )
    return tables


def _draw_statistics(path: Path, generated: fields.Statistics, real: fields.Statistics) -> None:
    (scalars, curves), (real_scalars, real_curves) = generated, real
    figure = plots.statistics(
        {name: (found, real_scalars[name]) for name, found in scalars.items()},
        {name: (found, real_curves[name]) for name, found in curves.items()},
    )
    figure.savefig(path)
