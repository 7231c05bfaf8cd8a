"""Train stage 2 on saved latents: `accelerate launch stage2_diffusion/train.py --config CONFIG [key.sub=value ...]`.

`stage2.latents=DIR` takes latents from elsewhere; neither images nor stage 1 are needed then. Run the same command
again to go on where it stopped.
"""

from pathlib import Path

from shared import config
from shared.config import InputError
from shared.recipe import parse_config
from shared.run import claim_run


def open_latents(recipe, run: Path):
    """The cache that a recipe trains on, refused where it is not of this run's newest VAE or has another shape."""
    from shared.data import latents
    from shared.training import checkpoint

    folder = Path(recipe.stage2.latents or run / "latents").expanduser()
    cache = latents.open_cache(folder)
    if not recipe.stage2.latents and (newest := checkpoint.newest(run / "stage1_vae" / "checkpoints")):
        latents.refuse_if_stale(folder, latents.fingerprint(newest, latents.read_fingerprint(folder)["data"]))
    if list(shape := cache.split("train").shape) != recipe.stage1.model.latent_shape:
        raise InputError(f"stage1.model.latent_shape: {recipe.stage1.model.latent_shape}, but the latents in {folder} are {list(shape)}")
    return cache


def main() -> None:
    recipe = parse_config("Train stage 2, the diffusion model.", needs_images=False)
    if recipe.stage2 is None:
        raise InputError("stage2: null: this recipe has no stage 2; samples come from the VAE's prior (python -m shared.generate)")
    from shared.sampling.pipeline import LatentDiffusionPipeline
    from shared.training import engine, processes
    from shared.training.tracker import start_trackers
    from stage2_diffusion.stage import DiffusionStage

    accelerator = processes.make_accelerator(recipe.stage2, recipe.tracking.with_, recipe.run)
    cache = open_latents(recipe, recipe.run)
    decoder = LatentDiffusionPipeline.from_vae(cache.folder)
    stage = DiffusionStage(recipe, cache, decoder.to(accelerator.device), accelerator)
    run = recipe.run
    processes.on_first_process(accelerator, lambda: claim_run(recipe))
    start_trackers(accelerator, recipe.tracking.with_, recipe.tracking.project, run, config.flatten(recipe))
    stage.introduce()
    engine.fit(stage, run / "stage2_diffusion", recipe.stage2, stage.max_steps, recipe.seed, accelerator)
    engine.export(stage.pipeline(), run / "pipeline", accelerator)
    accelerator.end_training()
    config.say(f"stage 2 done; pipeline: {run}/pipeline; samples: python -m shared.generate --run {run}")


if __name__ == "__main__":
    config.run(main)
