"""A stage's state: into a checkpoint and back, from other people's weights, the same on all processes.

Knows models, averages and optimizers by name. Does not depend on what is trained, nor on when it is saved.
"""

import math
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from shared import disk
from shared.config import InputError, say
from shared.training import checkpoint
from shared.training.config import TrainConfig
from shared.training.ema import Ema
from shared.training.optim import Optimizer, learning_rate
from shared.training.processes import on_first_process

NAMED = 5  # of the tensors that do not fit


class Folder(Protocol):
    """Where a stage writes: checkpoints/, previews/ and metrics.jsonl."""

    @property
    def path(self) -> Path: ...
    @property
    def checkpoints(self) -> Path: ...
    @property
    def previews(self) -> Path: ...
    @property
    def metrics(self) -> Path: ...


class Stateful(Protocol):
    """What a checkpoint is made of."""

    models: dict[str, torch.nn.Module]
    emas: dict[str, Ema]
    optimizers: dict[str, Optimizer]

    def exports(self) -> dict[str, Any]:
        """{name: thing with save_pretrained(folder)}: what later stages and other people read."""


def tensors(stage: Stateful) -> dict[str, torch.Tensor]:
    """All that training needs to go on: raw weights and optimizer state (averaged weights are exports)."""
    found: dict[str, torch.Tensor] = {}
    for name, model in stage.models.items():
        found |= {f"model/{name}/{key}": value for key, value in model.state_dict().items()}
    for name, optimizer in stage.optimizers.items():
        found |= {f"optimizer/{name}/{key}": value for key, value in optimizer.tensors().items()}
    return found


def save(
    stage: Stateful, checkpoints: Path, step: int, keep: int, accelerator: Accelerator, score: Any = None
) -> None:
    """Write checkpoint `step` on the first process.

    score: what it validated as; the least one is never removed.
    """
    score = None if score is None or not math.isfinite(score) else float(score)
    _refuse_disagreement(stage, accelerator)
    length = {
        "max_steps": max((optimizer.max_steps for optimizer in stage.optimizers.values()), default=0),
        "until": {name: ema.until for name, ema in stage.emas.items() if math.isfinite(ema.until)},
    }

    def write() -> None:
        checkpoint.save(checkpoints, step, stage.exports(), tensors(stage), keep, score, length)

    on_first_process(accelerator, write)


def checkpoint_bytes(stage: Stateful) -> int:
    """What a checkpoint takes on disk: raw and averaged weights and the optimizers' moments."""
    weights = {name: value for name, value in tensors(stage).items() if name.startswith("model/")}
    moments = sum(optimizer.state_bytes() for optimizer in stage.optimizers.values())
    return checkpoint.bytes_needed(weights, stage.exports()) + moments


def kept_bytes(stage: Stateful, keep: int) -> int:
    """What the checkpoints of a training take at most: those to keep, the best, and the one being written."""
    return checkpoint_bytes(stage) * (keep + 2)


def refuse_if_too_large(stage: Stateful, folder: Folder, keep: int, accelerator: Accelerator) -> None:
    """Raises InputError where the disk has no room for the checkpoints that a training will keep."""

    def look() -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.path).free
        need = kept_bytes(stage, keep)
        if free < need:
            room = f"{need >> 20:,} MiB for its checkpoints, {free >> 20:,} are free"
            raise InputError(
                f"{folder.path}: this training needs {room}; take another run_dir or a lower keep"
            )

    on_first_process(accelerator, look)


def _refuse_disagreement(stage: Stateful, accelerator: Accelerator) -> None:
    """Raises InputError, naming a tensor, where the processes do not hold the same weights to the bit."""
    if accelerator.num_processes == 1:
        return
    named = [
        (f"{model}.{name}", p) for model, net in stage.models.items() for name, p in net.named_parameters()
    ]
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for _, p in named])
    for other in accelerator.gather(sums).view(-1, len(sums)):
        if not torch.equal(other, sums):
            name = named[int((other != sums).nonzero()[0])][0]
            cure = "not saved; the same command goes on from the last checkpoint"
            raise InputError(f"{name} is not the same on all processes; {cure}")


def export(pipeline: Any, folder: Path, accelerator: Accelerator) -> None:
    """Write what other people load, where an older one may be."""
    on_first_process(accelerator, lambda: disk.replace_folder(folder, pipeline.save_parts, carry=True))


def restore(stage: Stateful, folder: Folder, accelerator: Accelerator) -> int:
    """Bring a stage to its newest good checkpoint; returns that step, 0 where there is none.

    Raises InputError where a constant that it exports beside its models, such as the latents' statistics, is
    another one now.
    """
    found = on_first_process(accelerator, lambda: checkpoint.recover(folder.checkpoints))
    if found is None:
        return 0
    for name, constant in stage.exports().items():
        if name not in stage.emas and type(constant).from_pretrained(found / name).config != constant.config:
            cure = f"({name} differs); remove it to train anew on these"
            raise InputError(f"{folder.path} was trained on other latents or values {cure}")
    saved = disk.read_tensors(found / "training.safetensors")
    for name, model in stage.models.items():
        model.load_state_dict(_below(saved, f"model/{name}/"))
    for name, optimizer in stage.optimizers.items():
        optimizer.load(_below(saved, f"optimizer/{name}/"))
    for name, ema in stage.emas.items():
        ema.module.load_state_dict(disk.load_module(type(ema.module), found / name).state_dict())
    say(f"resuming from {found}")
    length = checkpoint.length_of(found)
    _keep_to_its_length(stage, length)
    return length["step"]


def _keep_to_its_length(stage: Stateful, length: dict[str, Any]) -> None:
    """Say what another max_steps does to the rate; an average that stood still stays so."""
    step = length["step"]
    for name, until in length.get("until", {}).items():
        if name in stage.emas and step >= until:
            stage.emas[name].until = until
    optimizer = next(iter(stage.optimizers.values()), None)
    before = length.get("max_steps")
    if optimizer and step > optimizer.max_steps:
        fewer = f"although max_steps is {optimizer.max_steps:,}"
        say(f"note: the stage keeps its {step:,} steps {fewer}; name=ANOTHER trains anew")
    elif optimizer and before:
        old, new = (learning_rate(optimizer.config, step, steps) for steps in (before, optimizer.max_steps))
        if old != new:
            change = f"the learning rate goes on at {new:.2g} where it stood at {old:.2g}"
            say(f"max_steps is {optimizer.max_steps:,} now, it was {before:,}: {change}")


def check_init(config: TrainConfig | None, folder: Folder, accelerator: Accelerator) -> None:
    """Raises InputError where a stage that has no checkpoint yet cannot begin from what its recipe names.

    Asked before the stages before it are trained.
    """

    def check() -> None:
        if config and config.init and not disk.checkpoints(folder.checkpoints):
            checkpoint.beginning(config.init, folder.path.name)

    on_first_process(accelerator, check)


def begin_from(stage: Stateful, folder: Folder, init: str, accelerator: Accelerator) -> None:
    """Fill a stage's models with the averaged weights of another run, export or checkpoint.

    Raises InputError where there is nothing to begin from or nothing fits.
    """
    place = on_first_process(accelerator, lambda: checkpoint.beginning(init, folder.path.name))
    for name, model in stage.models.items():
        file = place / name / "diffusion_pytorch_model.safetensors"
        if not file.is_file():  # of a discriminator, which is not exported
            continue
        taken, left = checkpoint.fill(model, file)
        if not taken:
            key = checkpoint.init_key(folder.path.name)
            raise InputError(f"{key}: nothing of {file} fits the {name} of this recipe")
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        rest = f"; not taken: {'; '.join(left[:NAMED])}{more}" if left else ""
        say(f"{name} begins from {place}: {taken} tensors{rest}")
    for ema in stage.emas.values():
        ema.restart()


def _below(saved: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
