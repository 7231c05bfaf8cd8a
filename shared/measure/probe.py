"""The diffusability of a run's latents."""

import tempfile
from dataclasses import replace
from pathlib import Path

from stage2_diffusion.config import Stage2Config, UNetConfig

PROBE_STEPS, PROBE_IMAGES = 300, 512


def probe(run: Path, recipe, newest: Path, extractor, x, seen_labels, accelerator) -> dict:
    """The diffusability of a run's latents: KID and FID of the decoded samples of a tiny flow model, trained on them for
    PROBE_STEPS steps (a minute on two cores), against held-out images."""
    from shared import trained
    from shared.data import latents, splits
    from shared.measure import features
    from shared.sampling.pipeline import LatentDiffusionPipeline
    from shared.training import engine
    from shared.training.config import EmaConfig, OptimConfig
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
    real = x[splits.evenly(len(x), count)]
    ours, theirs = (extractor.all(part, accelerator.device, "the probe") for part in (drawn.float(), real))
    found = features.distances(ours, theirs)
    return {"extractor": extractor.name, "images": count, "steps": PROBE_STEPS} | {
        key: found[key] for key in ("kid", "kid_deviation", "fid")
    }
