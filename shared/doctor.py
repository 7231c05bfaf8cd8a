"""Examine a run's VAE: `python -m shared.doctor --run RUN [--probe]`.

How many latents are in use and what each tells, how near the aggregate posterior is to the prior, whether the VAE has
collapsed and why; traversals and interpolations as GIFs, and what training did where its checkpoints were kept.
--probe trains a tiny diffusion model on the run's saved latents for about a minute and measures its decoded samples, so
that two VAEs can be compared before stage 2 is paid for. Writes RUN/report/doctor.json and pictures.
"""

import json

from shared import config
from shared.config import InputError
from shared.run import open_run

IMAGES = 2048  # held-out images looked at; up to five times as many of the training images


def main() -> None:
    parser = config.Parser(prog="python -m shared.doctor", description="Examine a run's VAE.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument("--probe", action="store_true", help="train a tiny diffusion model on the saved latents for a minute")
    options = parser.parse_args()
    run, recipe = open_run(options.run)
    if options.probe and not (run / "latents" / "manifest.json").is_file():
        raise InputError(f"--probe: {run} has no saved latents yet: accelerate launch stage1_vae/encode.py --run {run}")
    from shared import trained
    from shared.measure import features
    from shared.measure.latent_space import draw, examine, history, neighbours
    from shared.measure.probe import probe
    from shared.training.processes import make_accelerator

    accelerator = make_accelerator(recipe.stage1)
    device = accelerator.device
    vae, transform, newest = trained.open_vae(run, device)
    training, held_out, _ = trained.open_images(recipe)
    x, labels = trained.pixels(held_out, transform, IMAGES)
    if labels is not None or options.probe:
        seen, seen_labels = trained.pixels(training, transform, 5 * IMAGES)
    if options.probe and len(x) < 4:
        raise InputError(f"--probe: {len(x)} held-out images are too few; at least 4 (data.val_fraction)")
    names, folder = training.source.names, run / "report"
    folder.mkdir(exist_ok=True)
    with accelerator.autocast():
        mean, logvar = trained.encode(vae, x, device)
        found = {"checkpoint": newest.name} | examine(vae, recipe, x, mean, logvar, device)
        if labels is not None:
            found["knn_accuracy"] = neighbours(mean, labels, trained.encode(vae, seen, device)[0], seen_labels)
        draw(folder, vae, x, labels, names, mean, logvar, found, device)
        history(run, x, labels, names, mean, device)
    if options.probe:
        extractor = features.choose("auto", trained.are_photographs(training), seen, seen_labels, device)
        found["probe"] = probe(run, recipe, newest, extractor, x, seen_labels, accelerator)
    (folder / "doctor.json").write_text(json.dumps(found, indent=1) + "\n")
    config.say(f"{run.name}, {newest.name}, {len(x):,} held-out images; pictures in {folder}")
    config.show({key: value for key, value in found.items() if key not in ("checkpoint", "collapse")})
    config.say(f"  {found.get('collapse') or 'no collapse'}")


if __name__ == "__main__":
    config.run(main)
