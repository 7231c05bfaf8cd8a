"""What a training will take, before it is begun: parameters, steps, disk, time and memory.

`estimate` looks at a recipe, times a few steps of both stages and says what the whole takes on this machine.
`dry_run` does one step, one validation, one save and four samples of a stage. Neither leaves anything.
"""

import contextlib
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from shared import disk
from shared.config import say
from shared.data import latents, shard
from shared.data.batches import batches, workers
from shared.data.latents import Cache
from shared.data.sources import ImageSource
from shared.data.splits import Pixels
from shared.recipe import Recipe
from shared.run import RunFolder, StageFolder
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.training import engine, state, tracker
from shared.training.config import TrainConfig
from shared.training.processes import make_accelerator
from stage1_vae.encoding import by_element, moments_of
from stage1_vae.stage import VAEStage
from stage2_diffusion.config import Stage2Config
from stage2_diffusion.stage import DiffusionStage

SECONDS = 6.0  # spent on timed steps of a stage
FEW = 64  # images that are read to time it
LOOKING = 3.0  # seconds until the first of them were read
DRAWN = 4  # samples of a dry run


# ---------------------------------------------------------------- what the whole will take


def estimate(recipe: Recipe) -> None:
    """Say what a recipe takes: of each stage parameters, steps, epochs, disk and time; of latents the disk.

    Validations, pictures and saves are left out of the time. Latents from elsewhere are there already, and
    stage 2 alone is trained.
    """
    accelerator = make_accelerator(recipe.stage1)
    stage2 = recipe.stage2
    if stage2 and stage2.latents:
        cache = latents.open_cache(RunFolder(recipe.run).latents_of(recipe))
        seconds = _of_stage2(recipe, stage2, cache, len(cache.split("train")), accelerator)
    else:
        seconds = _of_images(recipe, accelerator)
    free = for_people(disk.free(recipe.run))
    say(f"in all about {_duration(seconds)} of this machine; {free} free where {recipe.run} will be")


def _of_images(recipe: Recipe, accelerator: Accelerator) -> float:
    """Say what all stages and the latents take, and return the seconds."""
    early = replace(recipe.stage1.discriminator, start_step=0, ramp_steps=0)  # the steps that cost most
    stage1 = VAEStage(replace(recipe.stage1, discriminator=early), recipe.data, recipe.seed, accelerator)
    stage1.data, decode = familiar(stage1.data, accelerator)
    seen = math.inf if recipe.stage2 else stage1.max_steps * recipe.stage1.batch_size
    seconds = decode * min(len(stage1.data), seen)
    if stage1.max_steps:
        seconds += _say_stage("stage 1", stage1, recipe.stage1, len(stage1.data), recipe.seed, accelerator)
    if recipe.stage2:
        with tempfile.TemporaryDirectory(prefix="latent-stack-") as place:
            seconds += _of_latents(recipe, recipe.stage2, stage1, Path(place), accelerator)
    return seconds


def _of_latents(
    recipe: Recipe, stage2: Stage2Config, stage1: VAEStage, place: Path, accelerator: Accelerator
) -> float:
    """Say what the latents and stage 2 take, and return the seconds of both."""
    cache = small_cache(stage1, place)
    copies = len(stage1.data) * recipe.data.augment.copies
    images = copies + len(stage1.held_out)
    _, each = time_encoding(stage1)
    encoding = each * images
    part = cache.split("train")
    stored = for_people(images * part.moments[0][0].nbytes)
    size = "x".join(map(str, part.shape))
    say(f"latents: {images:,} of {size}, {stored} on disk; about {_duration(encoding)}")
    return encoding + _of_stage2(recipe, stage2, cache, copies, accelerator)


def _of_stage2(
    recipe: Recipe, stage2: Stage2Config, cache: Cache, count: int, accelerator: Accelerator
) -> float:
    """Say what stage 2 takes on `count` latents such as those of a cache, and return its seconds."""
    decoder = LatentDiffusionPipeline.from_vae(cache.folder).to(accelerator.device)
    stage = DiffusionStage(stage2, recipe.sampling, recipe.seed, cache, decoder, accelerator)
    return _say_stage("stage 2", stage, stage2, count, recipe.seed, accelerator)


def _say_stage(
    title: str,
    stage: engine.Stage,
    config: TrainConfig,
    images: int,
    seed: int,
    accelerator: Accelerator,
) -> float:
    """Time some steps, say what the stage takes on its `images` training images, and return its seconds."""
    # The least of some steps: nothing makes one faster than it is.
    seconds = min(time_steps(stage, config, seed, accelerator, SECONDS))
    max_steps = config.steps(images)
    count = sum(p.numel() for model in stage.models.values() for p in model.parameters())
    epochs = max_steps * config.batch_size / images
    kept = state.kept_bytes(stage, config.keep)
    rate = config.batch_size / seconds
    say(
        f"{title}: {count / 1e6:.1f} M parameters, {max_steps:,} steps of {config.batch_size} "
        f"({epochs:.3g} epochs); checkpoints: {for_people(kept)}; "
        f"{rate:.3g} images/s, about {_duration(seconds * max_steps)}; "
        f"peak memory {memory(accelerator)}"
    )
    return seconds * max_steps


def time_steps(
    stage: engine.Stage,
    config: TrainConfig,
    seed: int,
    accelerator: Accelerator,
    seconds: float,
    first: int = 0,
) -> list[float]:
    """Seconds of optimizer updates from step `first` on, as many as fit, the first not counted."""
    data = batches(stage.data, config, seed, first, first + 10_000, accelerator)
    engine.update(stage, data, config, seed, first, accelerator)
    tracker.settled(accelerator.device)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        engine.update(stage, data, config, seed, first + 1 + len(times), accelerator)
        tracker.settled(accelerator.device)
        times.append(time.perf_counter() - started)
    return times


def familiar(pixels: Pixels, accelerator: Accelerator) -> tuple[Pixels, float]:
    """As many images, but a few over and over, and the seconds that each other one takes once.

    A large file takes long the first time alone (images.Decoder); steps are timed without that. The few are
    others each time: those of an earlier time were decoded then, but few of the rest.
    """
    if not isinstance(pixels.source, ImageSource):
        return pixels, 0.0
    rows: list[int] = []
    started = time.perf_counter()
    for row in np.random.default_rng().permutation(len(pixels))[:FEW]:
        pixels.__getitems__([row])
        rows.append(row)
        if time.perf_counter() - started > LOOKING:
            break
    first = time.perf_counter()
    pixels.__getitems__(rows)
    again = time.perf_counter()
    decode = max(0.0, (first - started) - (again - first)) / len(rows)
    loaders = max(1, workers(pixels.num_workers, accelerator))
    return Pixels(pixels.source, np.resize(pixels.indices[rows], len(pixels))), decode / loaders


def time_encoding(stage: VAEStage) -> tuple[float, float]:
    """Seconds of an image: read by one process; read and encoded in a batch, while loader processes read.

    Of the last images: of arrays the first ones were read a moment ago, and a disk is slower than memory.
    """
    rows = list(range(max(0, len(stage.data) - FEW), len(stage.data)))
    started = time.perf_counter()
    raw = stage.data.__getitems__(rows)["raw"]
    read = time.perf_counter()
    moments_of(stage.emas["vae"].module, stage.transform, raw, stage.accelerator)
    encoded = time.perf_counter()
    loaders = workers(stage.data.num_workers, stage.accelerator)
    reading, encoding = read - started, encoded - read
    both = max(reading / loaders, encoding) if loaders else reading + encoding
    return reading / len(rows), both / len(rows)


def small_cache(stage: VAEStage, place: Path) -> Cache:
    """A cache of the moments of a few images by the VAE as it stands."""
    for name, module in stage.exports().items():
        module.save_pretrained(place / name)
    rows = list(range(min(FEW, len(stage.data))))
    batch = stage.data.__getitems__(rows)
    moments = moments_of(stage.emas["vae"].module, stage.transform, batch["raw"], stage.accelerator)
    plan = latents.planned(place, {split: len(rows) for split in latents.SPLITS})
    paths = [path for entries in plan.values() for path, _ in entries]
    for path in paths:
        shard.write(path, moments, batch.get("label"))
    summaries = {path: shard.summarise(path) for path in paths}
    latents.finish(place, place, by_element(stage.raw_vae), stage.data.source.names, plan, summaries)
    return latents.open_cache(place)


# ---------------------------------------------------------------- one of everything


def dry_run(
    stage: VAEStage | DiffusionStage, config: TrainConfig, seed: int, accelerator: Accelerator, run: Path
) -> None:
    """One step, one validation, one save beside where the run will be, four samples; says what each took."""
    with tempfile.TemporaryDirectory(prefix=disk.TEMPORARY, dir=disk.existing(run)) as place:
        folder = StageFolder(Path(place))
        if config.trains:
            _try_a_step(stage, config, seed, accelerator)
        started = time.perf_counter()
        with contextlib.redirect_stdout(None):  # what it says of a network that has learned nothing yet
            scores = stage.validate(iter)
        _said("one validation:", f"{stage.best_by} {float(scores[stage.best_by]):.4g}", started)
        started = time.perf_counter()
        state.save(stage, folder.checkpoints, 1, config.keep, accelerator)
        _said("one save:", for_people(state.checkpoint_bytes(stage)), started)
        started = time.perf_counter()
        pipe = stage.pipeline().to(accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        pixels = pipe(seed=seed, batch_size=DRAWN).pixels
        _said("samples:", "x".join(map(str, pixels.shape)), started)
    say(f"dry run: all of it works; peak memory {memory(accelerator)}")


def _try_a_step(
    stage: VAEStage | DiffusionStage, config: TrainConfig, seed: int, accelerator: Accelerator
) -> None:
    started = time.perf_counter()
    data = batches(stage.data, config, seed, 0, 1, accelerator)
    logs = engine.update(stage, data, config, seed, 0, accelerator)
    loss = ", ".join(f"{k.removeprefix('loss/')} {float(v):.4g}" for k, v in logs.items() if "loss/" in k)
    _said("one step of", f"{config.batch_size} images: {loss}", started)


def _said(what: str, found: str, started: float) -> None:
    say(f"{what} {found} ({time.perf_counter() - started:.1f} s)")


def memory(accelerator: Accelerator) -> str:
    """The most that this process and its tensors on a GPU took so far, for people."""
    numbers = tracker.peak_memory(accelerator.device)
    return ", ".join(f"{name} {for_people(int(mib) << 20)}" for name, mib in numbers.items())


def for_people(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
