"""Sample: `python -m shared.generate --run RUN|PIPELINE_DIR [--num-images N] [--seed S] [--label L] ...`.

Writes grid.png, single PNGs and samples.npz (in the user's units). Every sample has its own seed, (seed,
index): neither the batch size nor the number of processes changes it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared import config
from shared.run import open_run
from shared.sampling.config import NAMES, SamplingConfig, check_flags, of_export

if TYPE_CHECKING:
    from shared.sampling.pipeline import LatentDiffusionPipeline


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.generate", description="Draw samples from a trained run or pipeline."
    )
    add = parser.add_argument
    add("--run", help="a run folder or an exported pipeline folder (the newest run by default)")
    add("--num-images", type=int, metavar="N", help="how many (as in the recipe)")
    add("--seed", type=int, default=0, metavar="S", help="of the noise (0)")
    add("--label", metavar="L", help="a class, by number or name (by default all classes in turn)")
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="1: none; above: away from no class, or from the guide (as in the recipe)",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="times, 0 data and 1 noise, between which guidance acts",
    )
    add("--sampler", choices=NAMES, help="another one than the recipe's")
    add("--num-steps", type=int, metavar="K", help="steps of the sampler (as in the recipe)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="what the networks compute in")
    add(
        "--checkpoint",
        choices=("newest", "best"),
        default="newest",
        help="of a run: the last one, or the one that validated best",
    )
    add("--batch-size", type=int, default=64, metavar="B", help="images computed at once")
    add("--image", metavar="FILE", help="begin from a picture, or from an .npy (C,H,W) in your units")
    add("--strength", type=float, metavar="S", help="0: the image as it is; 1: a new one (with --image)")
    add("--mask", metavar="FILE", help="of --image: draw anew where it is bright, and keep the rest")
    add("--upscale", type=int, metavar="K", help="--image is K times as small as what the model draws")
    add(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        help="a GIF between the samples of two seeds, or two files",
    )
    add("--out", help="where to write (RUN/samples by default; what begins from --image: RUN/edits)")
    options = parser.parse_args()
    options.run, samples, sampling = _resolve(options.run)
    usual = samples.with_name("edits") if options.image else samples  # samples are shown and published
    options.out_named = options.out is not None
    options.out = Path(options.out) if options.out else usual
    options.asked_steps = options.num_steps
    for name in ("num_images", "guidance_scale", "num_steps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(sampling, name))
    check_flags(options)
    return options


def _resolve(named: str | None) -> tuple[Path, Path, SamplingConfig]:
    """The folder to sample from, where its samples go, and what its recipe says of sampling."""
    if named and (Path(named) / "model_index.json").is_file():
        return Path(named), Path(named).parent / "samples", of_export(Path(named))
    run, recipe = open_run(named)
    return run.path, run.samples, recipe.sampling


def opened(options: argparse.Namespace) -> "LatentDiffusionPipeline":
    """The pipeline that was asked for."""
    import torch

    from shared import trained
    from shared.sampling.build import change_sampling

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    pipe = trained.open_pipeline(options.run, options.checkpoint, dtype)
    change_sampling(pipe, options.sampler, options.guidance_interval)
    return pipe


def main() -> None:
    options = parse()
    from shared.sampling import tasks  # after the run was found: these import torch
    from shared.show.grids import pictures
    from shared.show.samples import write_samples, write_way
    from shared.training.processes import join_processes

    state = join_processes()
    pipe = opened(options).to(state.device)
    count, seed, label = options.num_images, options.seed, options.label
    drawing = (options.guidance_scale, options.num_steps, options.batch_size)
    if options.interpolate:
        pixels = tasks.way(pipe, options.interpolate, count, label, *drawing, state)
        pixels = pictures(pixels, pipe.config.value_transform["integer"])
        if state.is_main_process:
            config.say(f"interpolation: {write_way(options.out, options.interpolate, pixels)}")
        return
    of_none = options.image and label is None  # else it would be drawn towards each class in turn
    labels = None if of_none else tasks.choose_labels(label, pipe.config.classes, count)
    if options.image:
        begin = (options.image, options.mask, options.strength, options.upscale, options.asked_steps)
        how = (options.guidance_scale, options.batch_size)
        parts = tasks.edited(pipe, tasks.read_edit(*begin), seed, count, labels, *how, state)
    else:
        parts = tasks.drawn(pipe, tasks.Noises(pipe, seed, count), labels, *drawing, state)
    classes = pipe.config.classes
    in_columns = len(classes) if label is None and not of_none else 0
    write_samples(options.out, parts, count, labels, classes, seed, in_columns, state)
    if state.is_main_process:
        config.say(f"{count} samples: {options.out}/grid.png")


if __name__ == "__main__":
    config.run(main)
