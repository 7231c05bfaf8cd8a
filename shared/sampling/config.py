"""The schema of `sampling:`, the one list of samplers, and what may be asked of a call. No torch."""

import argparse
import math
import re
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

from shared import disk
from shared.config import LAST_SEED, Contradictions, InputError, check_range, choice, number, say, switch
from shared.data.config import npy_header

# A new sampler is an entry here; for flow, one that was not made for it needs a branch in
# schedulers.make_scheduler, as dpmpp has. A test draws with each from an exact network.
# objective of stage 2 -> sampler -> the diffusers scheduler that integrates it: flow is an ODE in t, epsilon
# and v live on a DDPM schedule
SAMPLERS = {
    "flow": {
        "euler": "FlowMatchEulerDiscreteScheduler",
        "heun": "FlowMatchHeunDiscreteScheduler",
        "dpmpp": "DPMSolverMultistepScheduler",
    },
    "epsilon": {"ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler"},
    "v": {"ddim": "DDIMScheduler", "dpmpp": "DPMSolverMultistepScheduler"},
}
SAMPLE_FILES = r"\d{5,}\.png"  # the names of samples
NAMES = tuple(dict.fromkeys(name for samplers in SAMPLERS.values() for name in samplers))


@dataclass
class SamplingConfig:
    """What `generate` does when its flags say nothing else."""

    sampler: str = choice(
        "dpmpp", *NAMES, help="objective flow takes euler, heun, dpmpp; epsilon and v ddim, dpmpp"
    )
    num_steps: int = number(10, low=1, high=1000, help="steps of the sampler; dpmpp needs the fewest")
    guidance_scale: float = number(
        2.0,
        low=0,
        high=100,
        help="1: none; above, samples keep closer to their class, or away from the guide",
    )
    guidance_interval: list[float] = number(
        [0.0, 1.0], low=0, high=1, help="times, 0 data and 1 noise, between which guidance acts"
    )
    shift: float = number(
        1.0,
        low=0.1,
        high=100,
        help="of objective flow: above 1 more of the steps lie near noise, 2 for pictures",
    )
    unconditional_guide: bool = switch(
        False, help="the guide (stage2.guide_at) is told no class: samples keep closer to their own, too"
    )
    num_images: int = number(64, low=1, help="images of a call of generate")

    def contradictions(self) -> Contradictions:
        interval = self.guidance_interval
        if len(interval) != 2 or interval != sorted(interval):
            yield "guidance_interval", f"must be [low, high] between 0 (data) and 1 (noise), not {interval}"


def of_export(folder: Path) -> SamplingConfig:
    """How an exported pipeline samples: as its recipe, or without guidance where it does not say."""
    index = disk.read_json(folder / "model_index.json", "restore it from a copy") or {}
    said = index.get("sampling") or {"num_inference_steps": 30, "guidance_scale": 1.0}
    return SamplingConfig(num_steps=said["num_inference_steps"], guidance_scale=said["guidance_scale"])


# ---------------------------------------------------------------- the flags of generate


def check_flags(options: argparse.Namespace) -> None:
    """Whether samples can be drawn and written as asked. Raises InputError."""
    disk.check_writable(options.out)
    if not options.interpolate:  # which writes a GIF beside them
        _check_out(options.out, options.out_named)
    bounds = {field.name: field.metadata for field in fields(SamplingConfig)}
    names = ("num_images", "num_steps", "guidance_scale")
    as_in_a_recipe = {name: (bounds[name]["low"], bounds[name]["high"]) for name in names}
    check_range(options, **as_in_a_recipe, batch_size=(1, math.inf), seed=(0, LAST_SEED))
    low, high = options.guidance_interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise InputError(f"--guidance-interval: 0 <= LOW <= HIGH <= 1, not {low:g} {high:g}")
    _check_edit(options)


def _check_out(out: Path, named: bool) -> None:
    """Say which samples will be replaced, of a folder that was named. Raises InputError where others lie."""
    count, another = 0, "of another kind: name another folder, or remove it"
    if (out / "samples.npz").is_file():
        try:
            with zipfile.ZipFile(out / "samples.npz") as file, file.open("x.npy") as x:
                file.getinfo("seed.npy")
                (count, *_), _ = npy_header(x)
        except (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
            raise InputError(f"--out: {out} holds a samples.npz {another}") from None
    pictures = {file.name for file in out.glob("*.png") if re.fullmatch(SAMPLE_FILES, file.name)}
    foreign = {name for name in pictures if not count or int(name.removesuffix(".png")) >= count}
    if not count and (out / "grid.png").exists():
        foreign.add("grid.png")
    if foreign:
        raise InputError(f"--out: {out} holds a {min(foreign)} {another}")
    if count and named:
        say(f"note: {out} holds {count:,} samples, which are replaced")


def _check_edit(options: argparse.Namespace) -> None:
    """What is said of an image of one's own. Raises InputError."""
    if options.image is None and (options.mask or options.strength is not None or options.upscale):
        raise InputError("--mask, --strength, --upscale: of which image? Name it with --image")
    if options.image and options.interpolate:
        raise InputError("--interpolate: is between two seeds or two files; without --image")
    if options.upscale is not None and (options.upscale < 2 or options.mask or options.strength is not None):
        raise InputError("--upscale: a factor of 2 or more, without --mask and --strength")
    if options.strength is not None and not 0 <= options.strength <= 1:
        raise InputError(f"--strength: between 0 and 1, not {options.strength:g}")
