"""Train stage 1: `accelerate launch stage1_vae/train.py --config CONFIG [--dry-run] [key.sub=value ...]`.

Run the same command again to go on where it stopped.
"""

from shared import config, disk
from shared.recipe import Recipe, parse_config
from shared.run import RunFolder, claim_run


def train(recipe: Recipe, only_try: bool = False) -> None:
    """Stage 1 of a checked recipe, from its newest checkpoint on; or one of everything, to try it."""
    # After the recipe was checked: these import torch.
    from shared.data.splits import identity, look_through
    from shared.training import engine, processes, state
    from shared.training.tracker import start_trackers
    from stage1_vae.stage import VAEStage

    run = RunFolder(recipe.run)
    accelerator = processes.make_accelerator(recipe.stage1, recipe.tracking.with_, run.stage("stage1").path)
    state.check_init(recipe.stage1, run.stage("stage1"), accelerator)
    state.check_init(recipe.stage2, run.stage("stage2"), accelerator)
    stage = VAEStage(recipe.stage1, recipe.data, recipe.seed, accelerator)
    if recipe.stage2:
        recipe.stage2.check_held_out(len(stage.held_out))
        recipe.stage2.check_latents(stage.latent_shape)
    if only_try:
        from shared.measure.estimate import dry_run

        dry_run(stage, recipe.stage1, recipe.seed, accelerator, run.path)
        return
    if not disk.checkpoints(run.stage("stage1").checkpoints):
        processes.on_first_process(accelerator, lambda: look_through(stage.data, recipe.data))
    with processes.alone_in(run.path, accelerator):
        processes.on_first_process(accelerator, lambda: claim_run(recipe, identity(stage.data, recipe.data)))
        start_trackers(accelerator, recipe.tracking, run.stage("stage1").path, config.flatten(recipe))
        stage.introduce()
        if stage.max_steps:
            engine.fit(stage, run.stage("stage1"), recipe.stage1, stage.max_steps, recipe.seed, accelerator)
        else:
            engine.keep_as_it_is(stage, run.stage("stage1"), accelerator)
        if recipe.stage2 is None:
            state.export(stage.pipeline(), run.pipeline, accelerator)
        accelerator.end_training()
    config.say(f"stage 1 done; reconstructions: {run.stage('stage1').previews}")


def main() -> None:
    train(*parse_config("Train stage 1, the VAE."))


if __name__ == "__main__":
    config.run(main)
