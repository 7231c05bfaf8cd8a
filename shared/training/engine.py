"""fit(): the only training loop. The engine owns time and disk; a stage owns the mathematics of one step.

Order of a step: key the random numbers, train on each micro-batch, average the weights, log, validate,
preview, save. It never sees a loss, an image size or a model's class.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from shared.config import InputError, say
from shared.data.batches import Batches, BatchOrder, batches
from shared.training import checkpoint
from shared.training.config import TrainConfig
from shared.training.keyed import Rows, seed_of
from shared.training.processes import StopFlag, Stopped, on_first_process
from shared.training.state import Folder, Stateful, begin_from, refuse_if_too_large, restore, save
from shared.training.tracker import Pace, Trace, Tracker

LOG_EVERY = 20  # steps between two fetches of logged numbers from the device
MOST_SKIPS = 10  # steps in a row without a finite gradient
NO_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)  # of a GPU, a Mac, a CPU

Watch = Callable[[Iterable], Iterable]


class Stage(Stateful, Protocol):
    """What the engine reads of a stage."""

    best_by: str  # the number of `validate` that is least where the weights are best

    @property
    def data(self) -> Batches:
        """The training images or latents."""

    def train_step(self, batch: dict[str, torch.Tensor], rows: Rows) -> dict[str, Any]:
        """One micro-batch: forward, loss, optimizer.step(loss). Returns numbers to log, on the device."""

    def validate(self, watch: Watch) -> dict[str, Any]:
        """Numbers measured on held-out data with the averaged weights, equal on all processes.

        What takes long is done in parts, `for part in watch(parts)`: a stop asked for takes effect between
        two of them.
        """

    def preview(self) -> Image.Image:
        """A picture of the present state."""


# ---------------------------------------------------------------- the loop


def fit(
    stage: Stage, folder: Folder, config: TrainConfig, max_steps: int, seed: int, accelerator: Accelerator
) -> None:
    """Train a stage in its folder to `max_steps` updates, from the newest good checkpoint if there is one."""
    start = _begin(stage, folder, config, max_steps, accelerator)
    if start >= max_steps:
        return
    if accelerator.num_processes > 2:
        _rehearse(stage, config, max_steps, seed, accelerator)
    tracker = Tracker(folder.metrics, accelerator, start)
    pace = Pace(accelerator.device)
    data = pace.waiting(batches(stage.data, config, seed, start, max_steps, accelerator))
    skipped: list[dict] = []
    trace = Trace(config.profile, folder, accelerator)
    with StopFlag(accelerator) as stop, _progress(folder, config, start, max_steps, accelerator) as bar:
        for step in range(start, max_steps):
            # Train.
            done = step + 1
            trace.at(step)
            tracker.add(done, update(stage, data, config, seed, step, accelerator))
            pace.images += config.batch_size
            bar.update(config.batch_size)

            # Validate and draw, unless a stop was asked for.
            last = done == max_steps
            stopped = stop.after(done)
            scores: dict[str, Any] = {}
            if not stopped and (last or done % config.validate_every == 0):
                try:
                    with pace.aside():
                        scores = stage.validate(stop.watch)
                except Stopped:
                    stopped = stop.raised()
            if scores:
                tracker.add(done, scores)
                _tell(bar, f"step {done:,}, held out: {_brief(scores, 'val/')}", accelerator)

            # Log, before anything is saved or drawn: a training that diverged is not.
            drawing = not stopped and (last or done % config.preview_every == 0)
            saving = bool(last or stopped or done % config.save_every == 0)
            if saving or drawing or done % LOG_EVERY == 0:
                tracker.add(done, pace.numbers())
                lines = tracker.flush()
                skipped = _refuse_divergence([*skipped, *lines], saving, stage.data, config.batch_size, seed)
                bar.set_postfix_str(_brief(lines[-1], "loss/"), refresh=False)
            if drawing:
                with pace.aside():
                    _keep_preview(stage.preview(), folder, done, accelerator)

            # Save.
            if saving:
                with pace.aside():
                    save(stage, folder.checkpoints, done, config.keep, accelerator, scores.get(stage.best_by))
            if stopped:
                bar.close()
                say(f"stopped at step {done}, checkpoint saved; the same command goes on from here")
                sys.exit(128 + stopped)
        trace.end()


def _begin(stage: Stage, folder: Folder, config: TrainConfig, last: int, accelerator: Accelerator) -> int:
    """Bring a stage to where its training goes on, or begins; returns that step.

    A validation that a stop has cut off is made up for: a stage may learn from it.
    """
    start = restore(stage, folder, accelerator)
    if start == 0 and config.init:
        begin_from(stage, folder, config.init, accelerator)
    if start == 0:
        refuse_if_too_large(stage, folder, config.keep, accelerator)
    due = start >= last or (start and start % config.validate_every == 0)
    if due and not on_first_process(accelerator, lambda: checkpoint.is_measured(folder.checkpoints)):
        _measure(stage, folder, start, config.keep, accelerator)
    return start


def update(
    stage: Stage, data: Iterator[dict], config: TrainConfig, seed: int, step: int, accelerator: Accelerator
) -> dict[str, Any]:
    """One optimizer update, in parts where the recipe says so; then the averages. Returns numbers to log."""
    torch.manual_seed(seed_of(seed, step, accelerator.process_index))  # for dropout
    parts = range(config.grad_accumulation)
    logs = [_micro_step(stage, next(data), config, seed, step, part, accelerator) for part in parts]
    for ema in stage.emas.values():
        ema.update(step)
    return _mean(logs)


def _rehearse(stage: Stage, config: TrainConfig, max_steps: int, seed: int, accelerator: Accelerator) -> None:
    """The last step's first part, without an update.

    DistributedDataParallel sorts gradients anew after its first backward pass, and a sum over three or more
    processes depends on where a gradient stands. So a resume would sum otherwise than the training it goes on
    with, in the last bits. The last step is one in which everything is trained.
    """
    batch = next(batches(stage.data, config, seed, max_steps - 1, max_steps, accelerator))
    for optimizer in stage.optimizers.values():
        optimizer.rehearsing = True
    _micro_step(stage, batch, replace(config, grad_accumulation=1), seed, max_steps - 1, 0, accelerator)
    for optimizer in stage.optimizers.values():
        optimizer.rehearsing = False


def keep_as_it_is(stage: Stage, folder: Folder, accelerator: Accelerator) -> None:
    """Measure, draw and save, as checkpoint 0, a stage of which nothing is trained. Once."""
    if on_first_process(accelerator, lambda: checkpoint.recover(folder.checkpoints)):
        return
    _measure(stage, folder, 0, 2, accelerator)


def _measure(stage: Stage, folder: Folder, step: int, keep: int, accelerator: Accelerator) -> None:
    """Validate, draw and save a stage as it is."""
    tracker = Tracker(folder.metrics, accelerator, step)
    scores = stage.validate(iter)
    tracker.add(step, scores)
    tracker.flush()
    if accelerator.is_main_process:
        say(f"held out: {_brief(scores, 'val/')}")
    _keep_preview(stage.preview(), folder, step, accelerator)
    save(stage, folder.checkpoints, step, keep, accelerator, scores.get(stage.best_by))


def _progress(
    folder: Folder, config: TrainConfig, start: int, max_steps: int, accelerator: Accelerator
) -> tqdm:
    """A bar that counts images: rate and time left."""
    return tqdm(
        desc=folder.path.name,
        initial=start * config.batch_size,
        total=max_steps * config.batch_size,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not accelerator.is_main_process,
    )


def _micro_step(
    stage: Stage, batch: dict, config: TrainConfig, seed: int, step: int, part: int, accelerator: Accelerator
) -> dict[str, Any]:
    rows = batch.pop("rows")
    share = Rows(seed, step, rows.start, rows.stop, config.batch_size, accelerator.device)
    pinned = accelerator.device.type == "cuda"  # else a copy under way could outlive what it is of
    batch = {key: value.to(accelerator.device, non_blocking=pinned) for key, value in batch.items()}
    for optimizer in stage.optimizers.values():
        optimizer.begin(step, part, config.grad_accumulation)
    try:
        return stage.train_step(batch, share)
    except RuntimeError as error:
        if not NO_MEMORY.search(str(error)):
            raise
        parts = f"{config.batch_size} images in {config.grad_accumulation} part(s)"
        cure = "a larger grad_accumulation of this stage makes them smaller"
        raise InputError(f"batch_size: {parts} do not fit into memory; {cure}") from None


def _mean(logs: list[dict]) -> dict[str, Any]:
    """Terms averaged over the micro-batches of a step (what only the last one reports stays as it is)."""
    averaged = {}
    for key in logs[-1]:
        values = [log[key] for log in logs if key in log]
        averaged[key] = values[0] if len(values) == 1 else sum(values) / len(values)
    return averaged


def _refuse_divergence(
    lines: list[dict], saving: bool, data: Batches, batch_size: int, seed: int
) -> list[dict]:
    """The lines at the end that are of skipped steps.

    Raises InputError where they are MOST_SKIPS or more, or, when something is to be saved, all that there
    are.
    """
    skips = [any(value == 1 for key, value in line.items() if key.startswith("skipped/")) for line in lines]
    if False in skips:
        lines = lines[len(skips) - skips[::-1].index(False) :]
    if len(lines) < MOST_SKIPS and not (saving and len(lines) > 1 and lines[0]["step"] == 1):
        return lines
    last = lines[-1]
    losses = {key.removeprefix("loss/"): value for key, value in last.items() if key.startswith("loss/")}
    terms = [name for name, value in losses.items() if not math.isfinite(value)]
    images = data.called[BatchOrder(len(data), batch_size, seed)(last["step"] - 1)]
    shown = ", ".join(map(str, images[:16])) + (" ..." if batch_size > 16 else "")
    raise InputError(
        f"steps {lines[0]['step']} to {last['step']}: no finite gradient in any of them "
        f"(not finite in the last: {', '.join(terms) or 'the gradient alone'}; its images: {shown}); "
        "look for NaN in the data, or lower optim.lr"
    )


def _brief(line: Mapping[str, Any], prefix: str) -> str:
    """The numbers of a log line whose names begin with the prefix, for people."""
    found = {key.removeprefix(prefix): float(value) for key, value in line.items() if key.startswith(prefix)}
    return ", ".join(f"{key} {value:.4g}" for key, value in found.items())


def _tell(bar: tqdm, line: str, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        bar.write(line)


def _keep_preview(picture: Image.Image, folder: Folder, step: int, accelerator: Accelerator) -> None:
    """Keep a preview as a file, and hand it to the trackers, at its step: what came before was logged."""
    if not accelerator.is_main_process:
        return
    folder.previews.mkdir(parents=True, exist_ok=True)
    picture.save(folder.previews / f"step_{step:08d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_images({"preview": [picture]}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({"preview": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
