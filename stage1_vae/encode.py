"""Save the latents of a run's images: `accelerate launch stage1_vae/encode.py --run RUN`."""

from shared import config
from shared.run import open_run


def main() -> None:
    parser = config.Parser(description="Save the latents of a run's images.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    options = parser.parse_args()
    run, recipe = open_run(options.run)
    # After the run was found: these import torch.
    from shared.training.processes import alone_in, make_accelerator
    from stage1_vae.encoding import encode

    accelerator = make_accelerator(recipe.stage1)
    with alone_in(run.path, accelerator):
        stage = run.stage("stage1")
        encode(stage.checkpoints, stage.images, run.latents, recipe.data, accelerator)


if __name__ == "__main__":
    config.run(main)
