"""Examine a run: `python -m shared.doctor --run RUN [--probe]`.

Of the VAE: how many latents are in use and what each tells, how near the aggregate posterior is to the prior,
whether it has collapsed and why; traversals and interpolations as GIFs, and what training did where its
checkpoints were kept. Of stage 2: what is wrong with its samples, and the key that cures it. --probe trains
a tiny diffusion model on the run's saved latents, for about half a minute, and measures its decoded samples.
Writes RUN/report/doctor.json and pictures.
"""

import argparse
from typing import Any

from shared import config, disk
from shared.config import InputError
from shared.recipe import Recipe
from shared.run import RunFolder, borrows, measured, model_of, newest_model, open_run

IMAGES = 2048  # held-out images looked at; up to five times as many of the training images
LEAST_IMAGES = 4  # that a probe can be measured on


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.doctor", description="Examine a run: its VAE, and its samples."
    )
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument(
        "--probe", action="store_true", help="train a tiny diffusion model on the latents for half a minute"
    )
    return parser.parse_args()


def diagnose(run: RunFolder, recipe: Recipe, with_probe: bool) -> dict[str, Any]:
    """What was found out of a run; draws its pictures.

    A run on latents from elsewhere has no VAE of its own.
    """
    from shared.training.processes import make_accelerator

    accelerator = make_accelerator(recipe.stage1)
    found = {} if borrows(run, recipe) else of_stage1(run, recipe, with_probe, accelerator)
    trained = (run.pipeline / "model_index.json").is_file() or newest_model(run, recipe) != run.pipeline
    if recipe.stage2 and trained:
        try:
            found["stage2"] = of_stage2(run, recipe, accelerator.device)
        except InputError as error:  # such as latents that are gone
            if not found:
                raise
            config.say(f"note: nothing is said of stage 2: {error}")
    if not found:
        raise InputError(f"{run.path}: nothing to examine yet: train it first")
    return found


def of_stage1(run: RunFolder, recipe: Recipe, with_probe: bool, accelerator: Any) -> dict[str, Any]:
    """What was found out of a VAE; draws its pictures."""
    from shared import trained
    from shared.measure import features, images
    from shared.measure.latent_space import draw, draw_history, examine, neighbours
    from shared.measure.probe import probe

    device = accelerator.device
    vae, transform, newest = trained.open_vae(run, device)
    training, held_out, _ = trained.open_images(run, recipe)
    x, labels = images.pixels(held_out, transform, IMAGES)
    if with_probe and len(x) < LEAST_IMAGES:
        least = f"at least {LEAST_IMAGES} (data.val_fraction)"
        raise InputError(f"--probe: {len(x)} held-out images are too few; {least}")
    seen, seen_labels = None, None
    if labels is not None or with_probe:
        seen, seen_labels = images.pixels(training, transform, 5 * IMAGES)
    run.report.mkdir(exist_ok=True)
    names = training.source.names
    with accelerator.autocast():
        mean, logvar = images.encode(vae, x, device)
        beta = recipe.stage1.loss_weights.kl
        found = {"checkpoint": newest.name} | examine(vae, beta, x, mean, logvar, device)
        if seen is not None and labels is not None and seen_labels is not None:
            found["knn_accuracy"] = neighbours(mean, labels, images.encode(vae, seen, device)[0], seen_labels)
        spectrum = found.get("latent_spectrum")
        draw(run.report, vae, x, labels, names, mean, logvar, device, spectrum, transform.integer)
        draw_history(run, x, labels, names, mean, device, transform.integer)
    if with_probe and seen is not None:
        known, channels = (seen, seen_labels), recipe.data.channels
        photographs = images.are_photographs(training)
        extractor = features.choose("auto", photographs, channels, lambda: known, device)
        found["probe"] = probe(run, recipe, newest, extractor, x, seen_labels, accelerator)
    return found


def of_stage2(run: RunFolder, recipe: Recipe, device: Any) -> dict[str, Any]:
    """What stage 2 does, and what is wrong with its samples."""
    from shared import trained
    from shared.measure import denoiser

    found = denoiser.examine(run, recipe, trained.open_pipeline(run.path), device)
    return found | {"verdicts": denoiser.verdicts(found, measured(run, newest_model(run, recipe)))}


def main() -> None:
    options = parse()
    run, recipe = open_run(options.run)
    folder = run.latents_of(recipe)
    if options.probe and borrows(run, recipe):
        raise InputError(f"--probe: {run.path} has no VAE of its own: ask the run that made {folder}")
    if options.probe and not (folder / "manifest.json").is_file():
        cure = f"accelerate launch stage1_vae/encode.py --run {run}"
        raise InputError(f"--probe: no saved latents in {folder} yet: {cure}")
    found = diagnose(run, recipe, options.probe)
    found["model"] = model_of(newest_model(run, recipe))
    disk.write_json(run.report / "doctor.json", found)
    if "images" in found:
        seen = f"{found['images']:,} held-out images"
        config.say(f"{run.path.name}, {found['checkpoint']}, {seen}; pictures in {run.report}")
        apart = ("checkpoint", "collapse", "stage2", "model")
        config.say_tree({key: value for key, value in found.items() if key not in apart})
        config.say(f"  {found.get('collapse') or 'no collapse'}")
    if "stage2" in found:
        config.say(f"stage 2 (numbers in {run.report}/doctor.json):")
        for line in found["stage2"]["verdicts"] or ["nothing found"]:
            config.say(f"  {line}")
        if found["stage2"]["still_learning"] is None:
            config.say("  one validation does not tell whether it is undertrained (stage2.validate_every)")


if __name__ == "__main__":
    config.run(main)
