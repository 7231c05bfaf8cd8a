"""Measure a run's reconstructions and samples.

`python -m shared.evaluate --run RUN [--split NAME] [--num-images N] [--extractor auto|inception|own]`

Reconstructions, samples, a memorisation meter and, where the recipe names a field, that field's own
statistics. Prints a table and writes RUN/report/metrics.json with pictures. Every figure stands beside the
number of images and the extractor. By default on the images held out from training; --split names another
split of the source.
"""

import argparse
import math
from typing import Any

from shared import config, disk
from shared.config import InputError
from shared.recipe import Recipe
from shared.run import RunFolder, borrows, model_of, newest_model, open_run


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.evaluate", description="Measure a run's reconstructions and samples."
    )
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument(
        "--split", help="a split of the source, such as test (by default what was held out from training)"
    )
    parser.add_argument(
        "--num-images",
        type=int,
        default=1000,
        metavar="N",
        help="samples to draw, and images to hold against them",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples")
    parser.add_argument(
        "--extractor",
        choices=("auto", "inception", "own"),
        default="auto",
        help="of features: FID's Inception, or a network of the data's own; auto: the first for 8-bit photos",
    )
    options = parser.parse_args()
    config.check_range(options, num_images=(8, math.inf), seed=(0, config.LAST_SEED))
    return options


def opened(named: str | None) -> tuple[RunFolder, Recipe]:
    """The run to measure. Raises InputError for one on latents from elsewhere: it has no VAE of its own."""
    run, recipe = open_run(named)
    if borrows(run, recipe):
        reason = f"it has no VAE of its own, for its latents are from {run.latents_of(recipe)}"
        raise InputError(f"{run.path}: {reason}; stage2.validate_samples=N measures samples in a training")
    return run, recipe


def main() -> None:
    options = parse()
    run, recipe = opened(options.run)
    from shared import trained  # after the run was found: these import torch
    from shared.measure import reconstructions, samples
    from shared.training.processes import make_accelerator

    accelerator = make_accelerator(recipe.stage1)
    vae, transform, newest = trained.open_vae(run, accelerator.device)
    training, part, name = trained.open_images(run, recipe, options.split)
    config.say(f"{run.path.name}, {len(part):,} images ({name}), {newest.name}")
    model = model_of(newest_model(run, recipe))
    result: dict[str, Any] = {"images": len(part), "split": name, "checkpoint": newest.name, "model": model}

    def record(found: dict[str, Any]) -> None:
        config.say_tree(found)
        result.update(found)
        if accelerator.is_main_process:
            disk.write_json(run.report / "metrics.json", result)

    # What was measured first stands on disk if the second cannot be.
    record({"reconstruction": reconstructions.reconstruct(recipe, vae, transform, part, accelerator)})
    asked = (options.num_images, options.seed, options.extractor)
    found = samples.measure_samples(run, recipe, vae, transform, training, part, *asked, accelerator)
    if options.split == recipe.data.split:  # training images are their own nearest
        del found["memorisation"]
    record(found)
    note = samples.told_of_copies(found)
    if note:
        config.say(note)


if __name__ == "__main__":
    config.run(main)
