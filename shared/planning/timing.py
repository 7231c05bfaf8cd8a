"""How long the steps of a drafted recipe take here: everything that facts.Pace has, within some seconds."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared.data import latents
from shared.data.batches import cores
from shared.measure.estimate import familiar, small_cache, time_encoding, time_steps
from shared.planning.facts import Pace
from shared.recipe import Recipe
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.tasks import choose_labels
from shared.training import state
from shared.training.processes import bf16_pays, make_accelerator
from shared.training.tracker import settled
from stage1_vae.stage import VAEStage
from stage2_diffusion.config import Stage2Config
from stage2_diffusion.stage import DiffusionStage

SECONDS = 2.5  # spent on timed steps of each kind, at most
SHARE = 0.005  # of the minutes: two sizes of three kinds of steps take a few per cent of them
LATE = 2000  # a step at which the adversarial term acts, in a draft
DRAFT = {"start_step": 1000, "ramp_steps": 1}  # of the discriminator of a draft
DRAWN = 16  # samples whose drawing is timed
AT_ONCE = 64  # of them on a GPU, as generate draws them


def machine_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory >> 30} GiB"
    count = cores()
    if device.type != "cpu":
        return f"{device.type}, {count} CPU cores"
    return f"{count} CPU core{'s' if count != 1 else ''} with{'' if bf16_pays(device) else 'out'} bfloat16"


def spent(minutes: float | None) -> float:
    """Seconds for timed steps of each kind, where there are these minutes for everything."""
    return SECONDS if minutes is None else min(SECONDS, SHARE * 60 * minutes)


def measure(recipe: Recipe, begun: float, seconds: float) -> Pace:
    """Time a drafted recipe, as it will train.

    Arguments:
        recipe: a draft; its discriminator begins as DRAFT says.
        begun: when a command like those of the run would have begun, by time.perf_counter.
        seconds: for timed steps of each kind.

    Raises:
        InputError: as the stages would.
    """
    accelerator = make_accelerator(recipe.stage1)
    with contextlib.redirect_stdout(None):  # what it says of the images, the training will say
        stage1 = VAEStage(recipe.stage1, recipe.data, recipe.seed, accelerator)
    command = time.perf_counter() - begun
    stage1.data, decode = familiar(stage1.data, accelerator)
    stage1.held_out, _ = familiar(stage1.held_out, accelerator)
    with tempfile.TemporaryDirectory(prefix="latent-stack-") as place:
        plain, adversarial, check1, disk, latent = 0.0, 0.0, 0.0, 0, 0
        if stage1.max_steps:  # else it only encodes
            plain = adversarial = _step(stage1, recipe.stage1, recipe.seed, accelerator, seconds)
            if recipe.stage1.loss_weights.adversarial:
                adversarial = _step(stage1, recipe.stage1, recipe.seed, accelerator, seconds, LATE)
            check1 = _check(stage1, Path(place) / "stage1", accelerator)
            disk = state.kept_bytes(stage1, recipe.stage1.keep)
        cache = small_cache(stage1, Path(place))
        read, encode = time_encoding(stage1)
        rest: dict[str, Any] = {"step2": 0.0, "check2": 0.0}
        if recipe.stage2:
            stage2, rest = _of_stage2(recipe, recipe.stage2, cache, Path(place), accelerator, seconds)
            disk += state.kept_bytes(stage2, recipe.stage2.keep)
            latent = cache.split("train").moments[0][0].nbytes
        else:
            rest["draw"] = _draw(stage1.pipeline(), recipe, accelerator)
    return Pace(
        command=command,
        step1=plain,
        step1_adversarial=adversarial,
        check1=check1,
        read=read,
        decode=decode,
        encode=encode,
        disk=disk,
        latents=latent,
        **rest,
    )


def of_stage2(
    recipe: Recipe, stage2: Stage2Config, cache: latents.Cache, begun: float, seconds: float
) -> dict[str, float]:
    """command, step2, check2 and draw of facts.Pace, of a run that has its latents."""
    accelerator = make_accelerator(stage2)
    command = time.perf_counter() - begun
    with tempfile.TemporaryDirectory(prefix="latent-stack-") as place:
        _, found = _of_stage2(recipe, stage2, cache, Path(place), accelerator, seconds)
    return found | {"command": command}


def _of_stage2(
    recipe: Recipe,
    config: Stage2Config,
    cache: latents.Cache,
    place: Path,
    accelerator: Accelerator,
    seconds: float,
) -> tuple[DiffusionStage, dict[str, float]]:
    decoder = LatentDiffusionPipeline.from_vae(cache.folder).to(accelerator.device)
    stage = DiffusionStage(config, recipe.sampling, recipe.seed, cache, decoder, accelerator)
    step = _step(stage, config, recipe.seed, accelerator, seconds)
    draw = _draw(stage.pipeline(), recipe, accelerator)
    check = _check(stage, place / "stage2", accelerator)
    if config.validate_samples:
        from shared.measure.samples import judge_in_training  # a second of imports

        # Distances take the same time for any number of samples, features do not.
        judge = judge_in_training(DRAWN, recipe, cache, decoder, accelerator)
        few = _seconds(lambda: judge(stage.pipeline()), accelerator)
        judge = judge_in_training(2 * DRAWN, recipe, cache, decoder, accelerator)
        each = max(0.0, _seconds(lambda: judge(stage.pipeline()), accelerator) - few) / DRAWN
        check += few + (config.validate_samples - DRAWN) * each
    return stage, {"step2": step, "check2": check, "draw": draw}


def _step(
    stage: Any, config: Any, seed: int, accelerator: Accelerator, seconds: float, first: int = 0
) -> float:
    """The mean of some steps, which is what a training takes."""
    times = time_steps(stage, config, seed, accelerator, seconds, first)
    return sum(times) / len(times)


def _check(stage: Any, folder: Path, accelerator: Accelerator) -> float:
    """A validation, a picture and a save."""

    def check() -> None:
        with contextlib.redirect_stdout(None):  # what it says of a network that has learned nothing yet
            stage.validate(iter)
        stage.preview()
        state.save(stage, folder, 1, 2, accelerator)

    return _seconds(check, accelerator)


def _draw(pipe: LatentDiffusionPipeline, recipe: Recipe, accelerator: Accelerator) -> float:
    """A sample's share of a batch."""
    pipe = pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    sampling = recipe.sampling
    on_cpu = accelerator.device.type == "cpu"
    count = DRAWN if on_cpu else min(AT_ONCE, sampling.num_images)  # a GPU takes more in the same time
    labels = choose_labels(None, pipe.config.classes, count) if recipe.stage2 else None
    noise = pipe.noises(recipe.seed, count)

    def draw() -> None:
        z = noise.to(accelerator.device)
        z = pipe.sample(z, labels, sampling.guidance_scale, sampling.num_steps)
        pipe.decode_latents(z).cpu()  # a GPU is waited for

    return _seconds(draw, accelerator) / count


def _seconds(action: Callable[[], Any], accelerator: Accelerator) -> float:
    """Of an action; on a GPU of its second time, for the first finds out how to compute it."""
    if accelerator.device.type != "cpu":
        action()
    settled(accelerator.device)
    started = time.perf_counter()
    action()
    settled(accelerator.device)
    return time.perf_counter() - started
