"""A machine with a GPU in one command: `python -m tests.benchmarks.gpu [--minutes 8]`.

The gpu tests first; then tables of both stages at several sizes of image, with and without torch.compile:
images/s, memory, the share of what a large product of matrices reaches on the same chip, and how often the
host waits for the device in a step; then sampling; then, in the minutes left, `quality` on Fashion-MNIST
where LATENT_STACK_DATA has it. Networks are the template's, images random. It runs on a CPU, too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared import config
from shared.data.batches import batches
from shared.measure import estimate
from shared.recipe import CONFIGS, Recipe
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.training import engine
from shared.training.processes import bf16_pays, make_accelerator
from stage1_vae.stage import VAEStage
from stage2_diffusion.stage import DiffusionStage
from tests.conftest import ROOT

HEAD = "| stage | px | batch | compiled | images/s | memory | share of the peak | host waits in a step |"
RULE = "|---|---|---|---|---|---|---|---|"


def peak(device: torch.device, side: int) -> float:
    """Operations a second of a product of two (side,side) matrices, in bf16 where that pays."""
    dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recipe_at(size: int, folder: Path, batch: int, compiled: bool) -> Recipe:
    """The template on random colour images of a size; its latents have an eighth of the sides."""
    x = folder / f"{size}.npy"
    if not x.is_file():
        np.save(x, np.random.default_rng(0).integers(0, 256, (max(64, batch), size, size, 3), dtype=np.uint8))
    side = size // 8
    overrides = [
        f"data.source={x}", f"data.image_size={size}", f"stage1.model.latent_shape=[16,{side},{side}]",
        f"stage1.batch_size={batch}", f"stage2.batch_size={batch}", "data.label_column=null",
        f"stage1.compile={str(compiled).lower()}", f"stage2.compile={str(compiled).lower()}",
        "stage1.discriminator.start_step=0",
    ]  # fmt: skip
    return config.load(Recipe, CONFIGS / "your_images.yaml", overrides)


def stages(recipe: Recipe, folder: Path) -> Iterator[tuple[str, engine.Stage, config.Any]]:
    """Both stages of a recipe, the second on the moments of the first as it stands."""
    assert recipe.stage2
    accelerator = make_accelerator(recipe.stage1)
    first = VAEStage(recipe.stage1, recipe.data, recipe.seed, accelerator)
    yield "1", first, recipe.stage1
    with tempfile.TemporaryDirectory(dir=folder) as place:
        cache = estimate.small_cache(first, Path(place))
        decoder = LatentDiffusionPipeline.from_vae(cache.folder).to(accelerator.device)
        yield (
            "2",
            DiffusionStage(recipe.stage2, recipe.sampling, recipe.seed, cache, decoder, accelerator),
            recipe.stage2,
        )


def measured(stage: engine.Stage, part: config.Any, top: float) -> tuple[float, str, float, str]:
    """Images/s, memory, share of the peak and waits of one update of a stage."""
    accelerator = stage.accelerator  # type: ignore[attr-defined]
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = min(estimate.time_steps(stage, part, 0, accelerator, estimate.SECONDS))
    data = batches(stage.data, part, 0, 0, 10, accelerator)
    with FlopCounterMode(display=False) as counter:
        engine.update(stage, data, part, 0, 0, accelerator)
    share = counter.get_total_flops() / seconds / top
    return part.batch_size / seconds, estimate.memory(accelerator), share, waits(stage, part, data)


def waits(stage: engine.Stage, part: config.Any, data: Iterator[dict]) -> str:
    """How often the host waits for the device in an update, and where."""
    accelerator = stage.accelerator  # type: ignore[attr-defined]
    if accelerator.device.type != "cuda":
        return "no device"
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.update(stage, data, part, 0, 1, accelerator)
    torch.cuda.set_sync_debug_mode("default")
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)}
    return f"{len(places)} {' '.join(sorted(places))}"


def table_of_training(sizes: list[int], folder: Path, compile_too: bool, top: float) -> None:
    print(HEAD, RULE, sep="\n", flush=True)
    for size in sizes:
        batch = max(8, min(64, 64**3 // size**2))
        for compiled in (False, True) if compile_too else (False,):
            for name, stage, part in stages(recipe_at(size, folder, batch, compiled), folder):
                rate, memory, share, waited = measured(stage, part, top)
                cells = (name, size, batch, compiled, f"{rate:.4g}", memory, f"{share:.0%}", waited)
                print("|", " | ".join(map(str, cells)), "|", flush=True)


def table_of_sampling(size: int, folder: Path, counts: tuple[int, ...]) -> None:
    print("\n| samples at once | px | images/s |", "|---|---|---|", sep="\n", flush=True)
    recipe = recipe_at(size, folder, 8, False)
    recipe = replace(recipe, stage2=replace(recipe.stage2, guide_at=None))
    *_, (_, stage, _) = stages(recipe, folder)
    pipe = stage.pipeline()  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)
    for count in counts:
        noise = pipe.noises(0, count)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            pipe.decode_latents(pipe.sample(noise, None, 1.0, recipe.sampling.num_steps))
            best = min(best, time.perf_counter() - started)
        print(f"| {count} | {size} | {count / best:.4g} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--matrix", type=int, default=8192, help="side of the product that is the peak")
    options = parser.parse_args()
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, PyTorch {torch.__version__}\n"
    )
    if device.type == "cuda":
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], cwd=ROOT, check=False
        )
    top = peak(device, options.matrix)
    print(f"peak: {top / 1e12:.3g} TFLOP/s, a product of {options.matrix} x {options.matrix} matrices\n")
    with tempfile.TemporaryDirectory() as folder:
        table_of_training(options.sizes, Path(folder), device.type == "cuda", top)
        table_of_sampling(options.sizes[0], Path(folder), (1, 64) if device.type == "cuda" else (1, 4))
    left = options.minutes - (time.monotonic() - begun) / 60
    data = os.environ.get("LATENT_STACK_DATA")
    if device.type == "cuda" and data and left > 1:
        quality = ["-m", "tests.benchmarks.quality", "--data", data, "--minutes", f"{left:.1f}"]
        subprocess.run([sys.executable, *quality], cwd=ROOT, check=False)


if __name__ == "__main__":
    main()
