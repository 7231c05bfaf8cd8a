"""Sample: `python -m shared.generate --run RUN|PIPELINE_DIR [--num-images N] [--seed S] [--label L] ...`.

Writes grid.png, single PNGs and samples.npz (in the user's units). Every sample has its own seed, (seed,
index): neither the batch size nor the number of processes changes it.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shared import config
from shared.config import InputError
from shared.disk import TEMPORARY
from shared.run import open_run
from shared.sampling.config import SamplingConfig

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from shared.sampling.pipeline import LatentDiffusionPipeline

MOST_TILES = 400  # of the grid
MOST_COLUMNS = 16  # classes that have a column each
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
    add("--num-steps", type=int, metavar="K", help="steps of the sampler")
    add("--batch-size", type=int, default=64, metavar="B", help="images computed at once")
    add("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="a GIF between the samples of two seeds")
    add("--out", help="where to write (RUN/samples by default)")
    options = parser.parse_args()
    options.run, options.samples, sampling = _resolve(options.run)
    for name in ("num_images", "guidance_scale", "num_steps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(sampling, name))
    config.check_least(options, num_images=1, num_steps=1, batch_size=1, seed=0, guidance_scale=0)
    if options.interpolate and min(options.interpolate) < 0:
        raise InputError(f"--interpolate: seeds are at least 0, not {min(options.interpolate)}")
    return options


def _resolve(named: str | None) -> tuple[Path, Path, SamplingConfig]:
    """The folder to sample from, where its samples go, and what its recipe says of sampling."""
    if named and (Path(named) / "model_index.json").is_file():
        return Path(named), Path(named).parent / "samples", EXPORTED
    run, recipe = open_run(named)
    return run.path, run.samples, recipe.sampling


def write_samples(
    out: Path,
    values: "torch.Tensor",
    pixels: "torch.Tensor",
    labels: "torch.Tensor | None",
    seed: int,
    columns: int,
) -> None:
    """The samples' files, put where older ones are once all of them are written."""
    import numpy as np

    from shared.show import grids

    out.mkdir(parents=True, exist_ok=True)
    arrays = {"x": values.numpy(), "seed": np.int64(seed)}
    if labels is not None:
        arrays["label"] = labels.numpy()
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out) as folder:
        new = Path(folder)
        for index, image in enumerate(pixels):
            grids.single(image).save(new / f"{index:05d}.png")
        tiles = min(len(pixels), MOST_TILES)
        full_rows = tiles // columns * columns or tiles
        grids.grid(pixels[:full_rows], columns).save(new / "grid.png")
        np.savez_compressed(new / "samples.npz", **arrays)  # type: ignore[arg-type]
        if (out / "samples.npz").is_file():  # of an earlier, perhaps longer row of samples
            for old in out.glob("*.png"):
                if re.fullmatch(r"\d{5}\.png", old.name):
                    old.unlink()
        for file in new.iterdir():
            file.replace(out / file.name)


def interpolate(
    pipe: "LatentDiffusionPipeline", options: argparse.Namespace, state: "PartialState", out: Path
) -> None:
    """A GIF from the sample of one seed to that of another, along the great circle between their noises."""
    import torch

    from shared import trained
    from shared.show import grids

    first, last = options.interpolate
    a = pipe.noise(first, 0, pipe.latent_shape)
    b = pipe.noise(last, 0, pipe.latent_shape)
    angle = torch.arccos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1)).clamp_min(1e-4)
    weights = torch.linspace(0, 1, options.num_images).view(-1, 1, 1, 1)
    noise = (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)
    classes = pipe.config.classes
    label = options.label or (classes or [None])[0]
    labels = trained.choose_labels(label, classes, len(noise))
    _, pixels = trained.sample(
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
    from shared import trained

    classes = pipe.config.classes
    labels = trained.choose_labels(options.label, classes, options.num_images)
    noise = pipe.noises(options.seed, options.num_images)
    values, pixels = trained.sample(
        pipe, noise, labels, options.guidance_scale, options.num_steps, options.batch_size, state
    )
    if state.is_main_process:
        columns = round(min(len(pixels), MOST_TILES) ** 0.5)
        if (
            labels is not None and options.label is None and len(classes) <= MOST_COLUMNS
        ):  # a column is a class
            columns = len(classes) * max(1, round(columns / len(classes)))
        write_samples(out, values, pixels, labels, options.seed, columns)
        config.say(f"{len(pixels)} samples: {out}/grid.png")


def main() -> None:
    options = parse()
    # After the run was found: these import torch.
    from shared import trained
    from shared.training.processes import join_processes

    state = join_processes()
    pipe = trained.open_pipeline(options.run).to(state.device)
    out = Path(options.out) if options.out else options.samples
    if options.interpolate:
        interpolate(pipe, options, state, out)
    else:
        draw(pipe, options, state, out)


if __name__ == "__main__":
    config.run(main)
