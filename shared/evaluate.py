"""Measure a run: `python -m shared.evaluate --run RUN [--split NAME] [--num-images N] [--extractor auto|inception|own]`.

Reconstructions, samples, a memorisation meter and, where the recipe names a field, that field's own statistics. Prints a
table and writes RUN/report/metrics.json with pictures. Every figure stands beside the number of images and the extractor.
By default on the images held out from training; --split names another split of the source.
"""

import json

from shared import config
from shared.run import open_run


def main() -> None:
    parser = config.Parser(prog="python -m shared.evaluate", description="Measure a run's reconstructions and samples.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument("--split", help="a split of the source, such as test (by default what was held out from training)")
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="samples to draw, and images to hold against them")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--extractor", choices=("auto", "inception", "own"), default="auto", help="what makes features of images")
    options = parser.parse_args()
    config.at_least(options, num_images=8, seed=0)
    run, recipe = open_run(options.run)
    from shared import trained
    from shared.measure.reconstructions import reconstruct
    from shared.measure.samples import judge
    from shared.training.processes import make_accelerator

    accelerator = make_accelerator(recipe.stage1)
    vae, transform, newest = trained.open_vae(run, accelerator.device)
    training, part, name = trained.open_images(recipe, options.split)
    (run / "report").mkdir(exist_ok=True)
    result = {"images": len(part), "split": name, "checkpoint": newest.name}
    config.say(f"{run.name}, {len(part):,} images ({name}), {newest.name}")
    measures = (
        lambda: reconstruct(recipe, vae, transform, part, accelerator),
        lambda: judge(run, recipe, vae, transform, training, part, options, accelerator),
    )
    for measure in measures:  # what was measured first stands on disk if the second cannot be
        found = measure()
        config.show(found)
        result |= found
        (run / "report" / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    config.run(main)
