"""Save the latents of a run's images: `accelerate launch stage1_vae/encode.py --run RUN`.

Each process encodes whole shards, so that an interrupted run goes on to the same bytes with any number of processes.
"""

from shared import config
from shared.run import open_run


def main() -> None:
    parser = config.Parser(description="Save the latents of a run's images.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    run, recipe = open_run(parser.parse_args().run)
    from shared.training.processes import make_accelerator
    from stage1_vae.encoding import encode

    encode(run, recipe, make_accelerator(recipe.stage1))


if __name__ == "__main__":
    config.run(main)
