"""Examine a run's VAE: `python -m shared.doctor --run RUN [--probe]`.

How many latents are in use and what each tells, how near the aggregate posterior is to the prior, whether the VAE has
collapsed and why; traversals and interpolations as GIFs, and what training did where its checkpoints were kept.
--probe trains a tiny diffusion model on the run's saved latents for about a minute and measures its decoded samples, so
that two VAEs can be compared before stage 2 is paid for. Writes RUN/report/doctor.json and pictures.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from shared import config
from shared.config import InputError
from shared.recipe import open_run
from stage2_diffusion.config import Stage2Config, UNetConfig

IMAGES = 2048  # held-out images looked at; up to five times as many of the training images
PROBE_STEPS, PROBE_IMAGES = 300, 512


def examine(vae, recipe, x, mean, logvar, device) -> dict:
    """The numbers: what stands in doctor.json."""
    import torch

    from shared import domain, trained
    from stage1_vae import diagnostics

    spread = diagnostics.Spread()
    x_hat = trained.decode(vae, mean, device)
    spread.add(x, x_hat)
    numbers = {name: value.item() for name, value in spread.numbers().items()}
    active, dz = diagnostics.active_units(mean), mean[0].numel()
    beta = recipe.stage1.loss_weights.kl
    centre, width = diagnostics.aggregate(mean, logvar)
    found = {"images": len(x), "dz": dz, "active_units": active}
    if not vae.deterministic:
        bits = diagnostics.kl_bits(mean, logvar)
        found |= {"bits_per_dimension": bits.mean().item(), "bits": bits.sum().item()}
    found |= {"aggregate_mean": centre.abs().mean().item(), "aggregate_std": width.mean().item()} | numbers
    found["times_better_than_mean_image"] = numbers["mean_image_mse"] / max(numbers["mse"], 1e-12)
    key = torch.Generator().manual_seed(0)
    noise = torch.randn(mean.shape, generator=key) * mean.std(0, correction=0)
    found["mse_with_latent_noise"] = {
        str(part): (trained.decode(vae, mean + part * noise, device) - x).square().mean().item() for part in (0.1, 0.25, 0.5, 1.0)
    }
    if mean.shape[-1] == mean.shape[-2] >= 4:
        found["latent_spectrum"] = domain.power_spectrum(mean.double().numpy()).mean((0, 1)).tolist()
    if len(x) >= diagnostics.ENOUGH:
        found["collapse"] = diagnostics.collapse(**numbers, active=active, dz=dz, beta=beta)
    return found


def neighbours(mean, labels, seen_mean, seen_labels) -> float:
    """Share of images whose class the 10 nearest training latents vote for (all of them where there are fewer)."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(min(10, len(seen_mean))).fit(seen_mean.flatten(1), seen_labels)
    return float(classifier.score(mean.flatten(1), labels))


def plane(mean):
    """The map of latents (N,c,h,w) to points (N,2): themselves if there are two, else the first two principal components."""
    from sklearn.decomposition import PCA

    flat = mean.flatten(1).numpy()
    if flat.shape[1] == 2:
        return lambda z: z.flatten(1).numpy()
    pca = PCA(2, random_state=0).fit(flat)
    return lambda z: pca.transform(z.flatten(1).numpy())


def draw(folder: Path, vae, x, labels, names, mean, logvar, found: dict, device) -> None:
    """The pictures of a VAE as it is."""
    import torch

    from shared import pictures, plots, trained
    from stage1_vae import diagnostics

    centre, width = (part.flatten().numpy() for part in diagnostics.aggregate(mean, logvar))
    bits = None if vae.deterministic else diagnostics.kl_bits(mean, logvar).flatten()
    spectrum = found.get("latent_spectrum")
    plots.latents(None if bits is None else bits.numpy(), centre, width, spectrum).savefig(folder / "latents.png")
    if mean[0].numel() > 1 and len(mean) > 1:
        title = "latents" if mean[0].numel() == 2 else "latents, two principal components"
        plots.scatter(plane(mean)(mean), labels, names, title).savefig(folder / "latent_space.png")
    if mean[0].numel() == 2:
        ticks = torch.linspace(-3, 3, 15)
        z = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), dim=-1).reshape(-1, *mean.shape[1:])
        pictures.grid(trained.decode(vae, z, device), 15).save(folder / "manifold.png")
    if bits is not None:
        rows = torch.arange(min(6, len(x))).repeat_interleave(7)
        z = mean[rows] + (0.5 * logvar[rows]).exp() * torch.randn(mean[rows].shape, generator=torch.Generator().manual_seed(0))
        tiles = torch.cat([x[: min(6, len(x)), None], trained.decode(vae, z, device).unflatten(0, (-1, 7))], dim=1)
        pictures.grid(tiles.flatten(0, 1), 8).save(folder / "stochastic.png")
    travel(folder, vae, mean, device)


def travel(folder: Path, vae, mean, device) -> None:
    """traversal.gif: a row for an image, a column for a latent, the eight that vary most; interpolation.gif: ways between images."""
    import torch

    from shared import pictures, trained

    flat = mean.flatten(1)
    order, deviation, images = flat.var(0, correction=0).argsort(descending=True)[:8], flat.std(0, correction=0), flat[:4]
    frames = []
    for step in torch.linspace(-3, 3, 16):
        z = images.repeat_interleave(len(order), 0)
        moved = order.repeat(len(images))
        z[torch.arange(len(z)), moved] = flat.mean(0)[moved] + step * deviation[moved]
        frames.append(pictures.grid(trained.decode(vae, z.reshape(-1, *mean.shape[1:]), device), len(order)))
    pictures.save_gif(frames, folder / "traversal.gif")
    ways = min(8, len(mean) // 2)
    if not ways:
        return
    a, b = mean[:ways], mean[ways : 2 * ways]
    frames = [pictures.grid(trained.decode(vae, torch.lerp(a, b, float(t)), device)) for t in torch.linspace(0, 1, 16)]
    pictures.save_gif(frames, folder / "interpolation.gif")
    still = [trained.decode(vae, torch.lerp(a, b, float(t)), device) for t in torch.linspace(0, 1, 10)]
    pictures.grid(torch.stack(still, dim=1).flatten(0, 1), 10).save(folder / "interpolation.png")


def history(run: Path, x, labels, names, last, device) -> None:
    """GIFs over the training, from the checkpoints that were kept: reconstructions, and latents in the last one's plane."""
    import numpy as np

    from shared import checkpoint, pictures, plots, trained
    from stage1_vae.model import DeepVAE

    kept = sorted((run / "stage1_vae" / "checkpoints").glob("step_*"))
    if len(kept) < 5 or last[0].numel() < 2 or len(x) < 2:
        return
    project, spaces, shown = plane(last), [], []
    for folder in kept:
        vae = checkpoint.load_module(DeepVAE, folder / "vae").to(device).eval()
        mean, _ = trained.encode(vae, x, device)
        spaces.append((checkpoint.step_of(folder), project(mean)))
        shown.append(pictures.pairs(x[:32], trained.decode(vae, mean[:32], device)))
    pictures.save_gif(shown, run / "report" / "reconstructions.gif", back=False)
    everywhere = np.concatenate([points for _, points in spaces[len(spaces) // 2 :]])
    bounds = np.quantile(everywhere, [0.002, 0.998], axis=0)
    figures = [plots.scatter(points, labels, names, f"step {step:,}", bounds) for step, points in spaces]
    pictures.save_gif([pictures.as_image(figure) for figure in figures], run / "report" / "latent_space.gif", back=False)


def probe(run: Path, recipe, newest: Path, extractor, x, seen_labels, accelerator) -> dict:
    """The diffusability of a run's latents: KID and FID of the decoded samples of a tiny flow model, trained on them for
    PROBE_STEPS steps (a minute on two cores), against held-out images."""
    from shared import data, engine, features, latents, trained
    from shared.pipeline import LatentDiffusionPipeline
    from shared.train_config import EmaConfig, OptimConfig
    from stage2_diffusion.stage import DiffusionStage

    cache = latents.open_cache(run / "latents")
    latents.refuse_if_stale(cache.folder, latents.fingerprint(newest, latents.read_fingerprint(cache.folder)["data"]))
    even = all(side % 2 == 0 for side in recipe.stage1.model.latent_shape[1:])
    stage2 = Stage2Config(
        unet=UNetConfig(channels=[64, 128] if even else [128], blocks_per_level=1, attention_levels=[]), batch_size=128,
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=30), ema=EmaConfig(decay=0.98), max_steps=PROBE_STEPS,
        save_every=PROBE_STEPS, validate_every=PROBE_STEPS, preview_every=2 * PROBE_STEPS,
    )  # fmt: skip
    decoder = LatentDiffusionPipeline.from_vae(cache.folder).to(accelerator.device)
    small = replace(recipe, stage2=stage2, sampling=replace(recipe.sampling, sampler="euler"))
    stage = DiffusionStage(small, cache, decoder, accelerator)
    with tempfile.TemporaryDirectory(prefix=".tmp-probe-", dir=run) as folder:
        engine.fit(stage, Path(folder) / "probe", stage2, PROBE_STEPS, recipe.seed, accelerator)
    pipe = stage.pipeline()
    count = min(PROBE_IMAGES, len(x))
    classes = trained.labels_like(seen_labels, cache.classes, count)
    with accelerator.autocast():
        _, drawn = trained.sample(pipe, pipe.noises(0, count), classes, 1.0, 10, 64, accelerator)
    real = x[data.evenly(len(x), count)]
    ours, theirs = (extractor.all(part, accelerator.device, "the probe") for part in (drawn.float(), real))
    found = features.distances(ours, theirs)
    return {"extractor": extractor.name, "images": count, "steps": PROBE_STEPS} | {
        key: found[key] for key in ("kid", "kid_deviation", "fid")
    }


def main() -> None:
    parser = config.Parser(prog="python -m shared.doctor", description="Examine a run's VAE.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument("--probe", action="store_true", help="train a tiny diffusion model on the saved latents for a minute")
    options = parser.parse_args()
    run, recipe = open_run(options.run)
    if options.probe and not (run / "latents" / "manifest.json").is_file():
        raise InputError(f"--probe: {run} has no saved latents yet: accelerate launch stage1_vae/encode.py --run {run}")
    from shared import features, trained
    from shared.engine import make_accelerator

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
