"""Sample: `python -m shared.generate --run RUN|PIPELINE_DIR [--num-images N] [--seed S] [--label L] ...`.

Writes grid.png, single PNGs and samples.npz (in the user's units). Every sample has its own seed, (seed,
index): neither the batch size nor the number of processes changes it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared import config
from shared.config import InputError
from shared.run import open_run
from shared.sampling.config import NAMES, SamplingConfig

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from shared.sampling.pipeline import LatentDiffusionPipeline

# A pipeline folder does not say how its recipe sampled.
EXPORTED = SamplingConfig(num_steps=30, guidance_scale=1.0)


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.generate", description="Draw samples from a trained run or pipeline."
    )
    add = parser.add_argument
    add("--run", help="a run folder or an exported pipeline folder (the newest run by default)")
    add("--num-images", type=int, metavar="N")
    add("--seed", type=int, default=0, metavar="S")
    add("--label", metavar="L", help="a class, by number or name (by default all classes in turn)")
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="1: none; above: away from no class, or from the guide",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="times, 0 data and 1 noise, between which guidance acts",
    )
    add("--sampler", choices=NAMES, help="another one than the recipe's")
    add("--num-steps", type=int, metavar="K", help="steps of the sampler")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="what the networks compute in")
    add(
        "--checkpoint",
        choices=("newest", "best"),
        default="newest",
        help="of a run: the last one, or the one that validated best",
    )
    add("--batch-size", type=int, default=64, metavar="B", help="images computed at once")
    add("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="a GIF between the samples of two seeds")
    add("--out", help="where to write (RUN/samples by default)")
    options = parser.parse_args()
    options.run, options.samples, sampling = _resolve(options.run)
    for name in ("num_images", "guidance_scale", "num_steps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(sampling, name))
    config.check_least(options, num_images=1, num_steps=1, batch_size=1, seed=0, guidance_scale=0)
    low, high = options.guidance_interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise InputError(f"--guidance-interval: 0 <= LOW <= HIGH <= 1, not {low:g} {high:g}")
    if options.interpolate and min(options.interpolate) < 0:
        raise InputError(f"--interpolate: seeds are at least 0, not {min(options.interpolate)}")
    return options


def _resolve(named: str | None) -> tuple[Path, Path, SamplingConfig]:
    """The folder to sample from, where its samples go, and what its recipe says of sampling."""
    if named and (Path(named) / "model_index.json").is_file():
        return Path(named), Path(named).parent / "samples", EXPORTED
    run, recipe = open_run(named)
    return run.path, run.samples, recipe.sampling


def opened(options: argparse.Namespace, device: "torch.device") -> "LatentDiffusionPipeline":
    """The pipeline that was asked for, on a device."""
    import torch

    from shared import trained
    from shared.sampling.schedulers import change_sampler

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    pipe = trained.open_pipeline(options.run, options.checkpoint, dtype)
    if options.sampler:
        change_sampler(pipe, options.sampler)
    if options.guidance_interval:
        pipe.register_to_config(guidance_interval=options.guidance_interval)
    return pipe.to(device)


def interpolate(
    pipe: "LatentDiffusionPipeline", options: argparse.Namespace, state: "PartialState", out: Path
) -> None:
    """A GIF from the sample of one seed to that of another, along the great circle between their noises."""
    from shared.sampling import tasks
    from shared.show import grids

    first, last = options.interpolate
    a = pipe.noise(first, 0, pipe.latent_shape)
    b = pipe.noise(last, 0, pipe.latent_shape)
    noise = tasks.great_circle(a, b, options.num_images)
    classes = pipe.config.classes
    label = options.label or (classes or [None])[0]
    labels = tasks.choose_labels(label, classes, len(noise))
    _, pixels = tasks.sample(
        pipe, noise, labels, options.guidance_scale, options.num_steps, options.batch_size, state
    )
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"interpolate_{first}_{last}.gif"
        grids.save_gif(grids.frames(pixels), path)
        config.say(f"interpolation: {path}")


def draw(
    pipe: "LatentDiffusionPipeline", options: argparse.Namespace, state: "PartialState", out: Path
) -> None:
    """Samples of all classes in turn, or of the one that was asked for."""
    from shared.sampling import tasks
    from shared.show.samples import write_samples

    classes = pipe.config.classes
    labels = tasks.choose_labels(options.label, classes, options.num_images)
    noise = pipe.noises(options.seed, options.num_images)
    values, pixels = tasks.sample(
        pipe, noise, labels, options.guidance_scale, options.num_steps, options.batch_size, state
    )
    if state.is_main_process:
        in_columns = len(classes) if labels is not None and options.label is None else 0
        write_samples(out, values, pixels, labels, options.seed, in_columns)
        config.say(f"{len(pixels)} samples: {out}/grid.png")


def main() -> None:
    options = parse()
    # After the run was found: these import torch.
    from shared.training.processes import join_processes

    state = join_processes()
    pipe = opened(options, state.device)
    out = Path(options.out) if options.out else options.samples
    if options.interpolate:
        interpolate(pipe, options, state, out)
    else:
        draw(pipe, options, state, out)


if __name__ == "__main__":
    config.run(main)
