"""Train stage 1: `accelerate launch stage1_vae/train.py --config CONFIG [key.sub=value ...]`.

Run the same command again to go on where it stopped.
"""

from shared import config
from shared.recipe import parse_config
from shared.run import claim_run


def main() -> None:
    recipe = parse_config("Train stage 1, the VAE.")
    from shared.training import engine, processes  # after the recipe was checked: this imports torch
    from shared.training.tracker import start_trackers
    from stage1_vae.stage import VAEStage

    accelerator = processes.make_accelerator(recipe.stage1, recipe.tracking.with_, recipe.run)
    stage = VAEStage(recipe, accelerator)
    run = recipe.run
    processes.on_first_process(accelerator, lambda: claim_run(recipe))
    start_trackers(accelerator, recipe.tracking.with_, recipe.tracking.project, run, config.flatten(recipe))
    stage.introduce()
    engine.fit(stage, run / "stage1_vae", recipe.stage1, stage.max_steps, recipe.seed, accelerator)
    if recipe.stage2 is None:
        engine.export(stage.pipeline(), run / "pipeline", accelerator)
    accelerator.end_training()
    config.say(f"stage 1 done; reconstructions: {run}/stage1_vae/previews")


if __name__ == "__main__":
    config.run(main)
