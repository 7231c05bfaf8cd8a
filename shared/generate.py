"""Sample: `python -m shared.generate --run RUN|PIPELINE_DIR [--num-images N] [--seed S] [--label L] ...`.

Writes grid.png, single PNGs and samples.npz (in the user's units). Every sample has its own seed, (seed, index): neither
the batch size nor the number of processes changes it.
"""

import re
from pathlib import Path

from shared import config
from shared.config import InputError
from shared.recipe import SamplingConfig, open_run


def parse() -> tuple:
    """The command's options, with what they leave open filled from the run's recipe."""
    parser = config.Parser(prog="python -m shared.generate", description="Draw samples from a trained run or pipeline.")
    parser.add_argument("--run", help="a run folder or an exported pipeline folder (the newest run by default)")
    parser.add_argument("--num-images", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--label", metavar="L", help="a class, by number or name (by default all classes in turn)")
    parser.add_argument("--guidance-scale", type=float, metavar="W", help="1: the class alone; above: more of it")
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
    for name, low in (("num_images", 1), ("num_steps", 1), ("batch_size", 1), ("seed", 0), ("guidance_scale", 0)):
        if not getattr(options, name) >= low:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {low}, not {getattr(options, name)}")
    if options.interpolate and min(options.interpolate) < 0:
        raise InputError(f"--interpolate: seeds are at least 0, not {min(options.interpolate)}")
    return run, options


def open_pipeline(path: Path):
    """The pipeline of an exported folder, or of a run: put together from its newest checkpoints, finished or not."""
    from shared import checkpoint
    from shared.pipeline import LatentDiffusionPipeline

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
    from shared.pipeline import LatentDiffusionPipeline

    try:
        return LatentDiffusionPipeline.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder}: not a pipeline of this stack ({' '.join(str(error).split())[:200]})") from None


def assemble(recipe, newest: Path, folder: Path):
    """The pipeline of a stage-2 checkpoint and the latents that it was trained on."""
    from diffusers import UNet2DModel

    from shared import checkpoint, latents
    from shared.pipeline import LatentDiffusionPipeline
    from shared.transforms import LatentCodec
    from stage2_diffusion.sampling import make_scheduler

    cache = latents.open_cache(folder)
    codec = LatentCodec.from_pretrained(newest / "codec").config
    if codec != cache.manifest["codec"]:
        raise InputError(f"{newest} was trained on other latents than {folder}")
    decoder = LatentDiffusionPipeline.from_vae(folder)
    unet = checkpoint.load_module(UNet2DModel, newest / "unet")
    scheduler = make_scheduler(recipe.stage2.objective, recipe.sampling.sampler)
    return LatentDiffusionPipeline(decoder.vae, unet, scheduler, codec, decoder.config.value_transform, cache.classes)


def choose_labels(label: str | None, classes: list[str], count: int):
    """Classes (count,) as a tensor: the one asked for, or all in turn; None where there are none."""
    import torch

    if label is None:
        return torch.arange(count) % len(classes) if classes else None
    if not classes:
        raise InputError(f"--label {label}: this model was trained without classes")
    if label not in classes and not (label.isdecimal() and int(label) < len(classes)):
        raise InputError(f"--label: no class {label!r}; there are {', '.join(classes)} (or 0 to {len(classes) - 1})")
    return torch.full((count,), classes.index(label) if label in classes else int(label))


def sample(pipe, noise, labels, options, state):
    """Values and pixels (N,C,H,W) for noise (N,c,h,w) on the first process; each process computes whole batches."""
    import torch
    from accelerate.utils import gather_object
    from tqdm import tqdm

    pipe.set_progress_bar_config(disable=True)
    starts = range(0, len(noise), options.batch_size)
    mine = []
    with tqdm(total=len(noise), unit="img", desc="sampling", disable=not state.is_main_process) as bar:
        for start in starts[state.process_index :: state.num_processes]:
            rows = slice(start, start + options.batch_size)
            out = pipe(noise[rows], None if labels is None else labels[rows], options.guidance_scale, options.num_steps)
            mine.append((start, torch.from_numpy(out.values), out.pixels.cpu()))
            bar.update(min(len(out.pixels) * state.num_processes, bar.total - bar.n))
    parts = sorted(gather_object(mine), key=lambda part: part[0])
    return torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


def write_samples(out: Path, values, pixels, labels, seed: int, columns: int | None) -> None:
    import numpy as np

    from shared import pictures

    out.mkdir(parents=True, exist_ok=True)
    if (out / "samples.npz").is_file():  # of an earlier, perhaps longer row of samples
        for old in out.glob("*.png"):
            if re.fullmatch(r"\d{5}\.png", old.name):
                old.unlink()
    for index, image in enumerate(pixels):
        pictures.single(image).save(out / f"{index:05d}.png")
    pictures.grid(pixels[:400], columns).save(out / "grid.png")
    arrays = {"x": values.numpy(), "seed": np.int64(seed)} | ({} if labels is None else {"label": labels.numpy()})
    np.savez_compressed(out / "samples.npz", **arrays)


def interpolate(pipe, options, state, out: Path) -> None:
    """A GIF from the sample of one seed to that of another, along the great circle between their noises."""
    import torch

    from shared import pictures

    a, b = (pipe.noise(seed, 0, pipe.latent_shape) for seed in options.interpolate)
    angle = torch.arccos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1)).clamp_min(1e-4)
    weights = torch.linspace(0, 1, options.num_images).view(-1, 1, 1, 1)
    noise = (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)
    labels = choose_labels(options.label or (pipe.config.classes or [None])[0], pipe.config.classes, len(noise))
    _, pixels = sample(pipe, noise, labels, options, state)
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"interpolate_{options.interpolate[0]}_{options.interpolate[1]}.gif"
        pictures.save_gif(pixels, path)
        config.say(f"interpolation: {path}")


def main() -> None:
    run, options = parse()
    import torch

    from shared.engine import join_processes

    state = join_processes()
    pipe = open_pipeline(run)
    out = Path(options.out) if options.out else (run.parent if (run / "model_index.json").is_file() else run) / "samples"
    pipe.to(state.device)
    if options.interpolate:
        return interpolate(pipe, options, state, out)
    labels = choose_labels(options.label, pipe.config.classes, options.num_images)
    noise = torch.stack([pipe.noise(options.seed, i, pipe.latent_shape) for i in range(options.num_images)])
    values, pixels = sample(pipe, noise, labels, options, state)
    if state.is_main_process:
        classes = len(pipe.config.classes)
        columns = classes if labels is not None and options.label is None and classes <= 16 else None
        write_samples(out, values, pixels, labels, options.seed, columns)
        config.say(f"{len(pixels)} samples: {out}/grid.png")
    return None


if __name__ == "__main__":
    config.run(main)
