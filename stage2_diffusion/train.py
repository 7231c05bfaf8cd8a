"""Train stage 2 on saved latents.

`accelerate launch stage2_diffusion/train.py --config CONFIG [--dry-run] [key.sub=value ...]`

`stage2.latents=DIR` takes latents from elsewhere; neither images nor stage 1 are needed then. Run the same
command again to go on where it stopped.
"""

from typing import TYPE_CHECKING

from shared import config
from shared.config import InputError
from shared.recipe import Recipe, parse_config
from shared.run import RunFolder, claim_run
from stage2_diffusion.config import Stage2Config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from shared.data.latents import Cache


def open_latents(recipe: Recipe, stage2: Stage2Config, run: RunFolder, accelerator: "Accelerator") -> "Cache":
    """The cache that a recipe trains on; refused if not of this run's newest VAE or of another shape."""
    from shared.data import latents
    from shared.training import checkpoint, processes

    folder = run.latents_of(recipe)
    processes.on_first_process(accelerator, lambda: latents.verify(folder))
    cache = latents.open_cache(folder)
    cache.num_workers = recipe.data.num_workers
    newest = None if stage2.latents else checkpoint.newest(run.stage("stage1").checkpoints)
    if newest is not None:
        made_of = latents.read_fingerprint(folder) or {}
        latents.refuse_if_stale(folder, latents.fingerprint(newest, made_of.get("data", {})))
    shape = list(cache.split("train").shape)
    model = recipe.stage1.model
    wanted = model.latent_shape
    if not model.pretrained and shape != wanted:  # of a VAE from outside the denoiser's own check says
        raise InputError(f"stage1.model.latent_shape: {wanted}, but the latents in {folder} are {shape}")
    return cache


def train(recipe: Recipe, stage2: Stage2Config, only_try: bool = False) -> None:
    """Stage 2 of a checked recipe, from its newest checkpoint on; or one of everything, to try it."""
    # After the recipe was checked: these import torch.
    from shared.sampling.pipeline import LatentDiffusionPipeline
    from shared.training import engine, processes, state
    from shared.training.tracker import start_trackers
    from stage2_diffusion.stage import DiffusionStage

    run = RunFolder(recipe.run)
    accelerator = processes.make_accelerator(stage2, recipe.tracking.with_, run.stage("stage2").path)
    state.check_init(stage2, run.stage("stage2"), accelerator)
    cache = open_latents(recipe, stage2, run, accelerator)
    decoder = LatentDiffusionPipeline.from_vae(cache.folder).to(accelerator.device)
    judge = None
    if stage2.validate_samples:
        from shared.measure.samples import judge_in_training

        judge = judge_in_training(stage2.validate_samples, recipe, cache, decoder, accelerator)
    stage = DiffusionStage(stage2, recipe.sampling, recipe.seed, cache, decoder, accelerator, judge)
    if only_try:
        from shared.measure.estimate import dry_run

        dry_run(stage, stage2, recipe.seed, accelerator, run.path)
        return
    with processes.alone_in(run.path, accelerator):
        processes.on_first_process(accelerator, lambda: claim_run(recipe))
        start_trackers(accelerator, recipe.tracking, run.stage("stage2").path, config.flatten(recipe))
        stage.introduce()
        engine.fit(stage, run.stage("stage2"), stage2, stage.max_steps, recipe.seed, accelerator)
        state.export(stage.pipeline(), run.pipeline, accelerator)
        accelerator.end_training()
    config.say(f"stage 2 done; pipeline: {run.pipeline}; samples: python -m shared.generate --run {run}")


def main() -> None:
    recipe, only_try = parse_config("Train stage 2, the diffusion model.", needs_images=False)
    if recipe.stage2 is None:
        cure = "samples come from the VAE's prior (python -m shared.generate)"
        raise InputError(f"stage2: null: this recipe has no stage 2; {cure}")
    train(recipe, recipe.stage2, only_try)


if __name__ == "__main__":
    config.run(main)
