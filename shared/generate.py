"""Sample: `python -m shared.generate --run RUN|PIPELINE_DIR [--num-images N] [--seed S] [--label L] ...`.

Writes grid.png, single PNGs and samples.npz (in the user's units). Every sample has its own seed, (seed, index): neither
the batch size nor the number of processes changes it.
"""

import re
import tempfile
from pathlib import Path

from shared import config
from shared.config import InputError
from shared.run import open_run
from shared.sampling.config import SamplingConfig


def parse() -> tuple:
    """The command's options, with what they leave open filled from the run's recipe."""
    parser = config.Parser(prog="python -m shared.generate", description="Draw samples from a trained run or pipeline.")
    parser.add_argument("--run", help="a run folder or an exported pipeline folder (the newest run by default)")
    parser.add_argument("--num-images", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--label", metavar="L", help="a class, by number or name (by default all classes in turn)")
    parser.add_argument("--guidance-scale", type=float, metavar="W", help="1: none; above: away from no class, or from the guide")
    parser.add_argument("--num-steps", type=int, metavar="K", help="steps of the sampler")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images computed at once")
    parser.add_argument("--interpolate", type=int, nargs=2, metavar=("A", "B"), help="a GIF between the samples of two seeds")
    parser.add_argument("--out", help="where to write (RUN/samples by default)")
    options = parser.parse_args()
    if options.run and (Path(options.run) / "model_index.json").is_file():
        run, sampling = Path(options.run), SamplingConfig()
    else:
        run, recipe = open_run(options.run)
        sampling = recipe.sampling
    for name in ("num_images", "guidance_scale", "num_steps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(sampling, name))
    config.at_least(options, num_images=1, num_steps=1, batch_size=1, seed=0, guidance_scale=0)
    if options.interpolate and min(options.interpolate) < 0:
        raise InputError(f"--interpolate: seeds are at least 0, not {min(options.interpolate)}")
    return run, options


def write_samples(out: Path, values, pixels, labels, seed: int, columns: int | None) -> None:
    import numpy as np

    from shared.show import grids

    out.mkdir(parents=True, exist_ok=True)
    arrays = {"x": values.numpy(), "seed": np.int64(seed)} | ({} if labels is None else {"label": labels.numpy()})
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out) as folder:
        new = Path(folder)
        for index, image in enumerate(pixels):
            grids.single(image).save(new / f"{index:05d}.png")
        grids.grid(pixels[:400], columns).save(new / "grid.png")
        np.savez_compressed(new / "samples.npz", **arrays)
        if (out / "samples.npz").is_file():  # of an earlier, perhaps longer row of samples
            for old in out.glob("*.png"):
                if re.fullmatch(r"\d{5}\.png", old.name):
                    old.unlink()
        for file in new.iterdir():
            file.replace(out / file.name)


def interpolate(pipe, options, state, out: Path) -> None:
    """A GIF from the sample of one seed to that of another, along the great circle between their noises."""
    import torch

    from shared import trained
    from shared.show import grids

    a, b = (pipe.noise(seed, 0, pipe.latent_shape) for seed in options.interpolate)
    angle = torch.arccos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1)).clamp_min(1e-4)
    weights = torch.linspace(0, 1, options.num_images).view(-1, 1, 1, 1)
    noise = (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)
    labels = trained.choose_labels(options.label or (pipe.config.classes or [None])[0], pipe.config.classes, len(noise))
    _, pixels = trained.sample(pipe, noise, labels, options.guidance_scale, options.num_steps, options.batch_size, state)
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"interpolate_{options.interpolate[0]}_{options.interpolate[1]}.gif"
        grids.save_gif(grids.frames(pixels), path)
        config.say(f"interpolation: {path}")


def main() -> None:
    run, options = parse()
    from shared import trained
    from shared.training.processes import join_processes

    state = join_processes()
    pipe = trained.open_pipeline(run)
    out = Path(options.out) if options.out else (run.parent if (run / "model_index.json").is_file() else run) / "samples"
    pipe.to(state.device)
    if options.interpolate:
        return interpolate(pipe, options, state, out)
    labels = trained.choose_labels(options.label, pipe.config.classes, options.num_images)
    noise = pipe.noises(options.seed, options.num_images)
    values, pixels = trained.sample(pipe, noise, labels, options.guidance_scale, options.num_steps, options.batch_size, state)
    if state.is_main_process:
        columns, classes = round(len(pixels[:400]) ** 0.5), len(pipe.config.classes)
        if labels is not None and options.label is None and classes <= 16:  # a column is a class
            columns = classes * max(1, round(columns / classes))
        write_samples(out, values, pixels, labels, options.seed, columns)
        config.say(f"{len(pixels)} samples: {out}/grid.png")
    return None


if __name__ == "__main__":
    config.run(main)
