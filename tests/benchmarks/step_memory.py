"""The memory of a training step, in a process of its own: `python -m tests.benchmarks.step_memory FOLDER
CONFIG [key=value ...]`.

Trains stage 2 on the latents of FOLDER where it has some, stage 1 otherwise, for a few steps of fit(), and
prints as JSON what a step must hold (weights, gradients, averages, the optimizer's state, what autograd keeps
for the backward pass) and the peak of the process above its imports, in bytes.
"""

import contextlib
import json
import resource
import sys
from pathlib import Path

import torch

from shared import recipe
from shared.run import RunFolder, StageFolder
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.training import engine, processes
from stage1_vae.stage import VAEStage
from stage2_diffusion.stage import DiffusionStage
from stage2_diffusion.train import open_latents

STEPS = 6
COUNTED = 3  # the step whose kept tensors are counted


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Kept:
    """Memory that autograd keeps until the backward pass: each piece once, parameters not at all."""

    def __init__(self, models):
        self.weights, self.bytes = (
            {p.untyped_storage().data_ptr() for model in models for p in model.parameters()},
            {},
        )

    def counting(self):
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.bytes[storage.data_ptr()] = storage.nbytes()
        return tensor


def make_stage(chosen: recipe.Recipe, folder: Path):
    """Stage 2 on the latents of a folder where it has some, stage 1 otherwise; and that stage's part of the
    recipe."""
    if not (folder / "latents").is_dir():
        accelerator = processes.make_accelerator(chosen.stage1)
        return VAEStage(chosen.stage1, chosen.data, chosen.seed, accelerator), chosen.stage1
    decoder = LatentDiffusionPipeline.from_vae(folder / "latents")
    accelerator = processes.make_accelerator(chosen.stage2)
    cache = open_latents(chosen, chosen.stage2, RunFolder(folder), accelerator)
    return DiffusionStage(
        chosen.stage2, chosen.sampling, chosen.seed, cache, decoder, accelerator
    ), chosen.stage2


def main() -> None:
    folder, config, *overrides = sys.argv[1:]
    processes.settle_process()
    chosen = recipe.load(Path(config), overrides, needs_images=not (Path(folder) / "latents").is_dir())
    before, peaks = resident(), []
    stage, schema = make_stage(chosen, Path(folder))
    kept, train_step = Kept(stage.models.values()), stage.train_step

    def counted(batch, rows):
        with kept.counting() if rows.step == COUNTED else contextlib.nullcontext():
            logs = train_step(batch, rows)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return logs

    stage.train_step = counted
    engine.fit(stage, StageFolder(Path(folder) / "memory"), schema, STEPS, 0, stage.accelerator)
    weights = size(p for model in stage.models.values() for p in model.parameters())
    parts = {
        "weights": weights,
        "gradients": weights,
        "averages": size(p for ema in stage.emas.values() for p in ema.module.parameters()),
        "optimizer": size(t for optimizer in stage.optimizers.values() for t in optimizer.tensors().values()),
        "kept": sum(kept.bytes.values()),
    }
    print(json.dumps(parts | {"peak": peaks[-1] - before}))


if __name__ == "__main__":
    main()
