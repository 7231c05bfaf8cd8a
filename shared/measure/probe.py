"""The diffusability of a run's latents.

A tiny flow model is trained on them for a minute and its samples are measured. So two VAEs can be compared
before stage 2 is paid for.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared.data import latents, splits
from shared.measure import features
from shared.measure.samples import judge
from shared.recipe import Recipe
from shared.run import RunFolder, StageFolder
from shared.sampling import tasks
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.training import engine
from shared.training.config import EmaConfig, OptimConfig
from stage2_diffusion.config import Stage2Config, UNetConfig
from stage2_diffusion.stage import DiffusionStage

PROBE_STEPS = 300
PROBE_IMAGES = 512
SAMPLER_STEPS = 10


def probe(
    run: RunFolder,
    recipe: Recipe,
    newest: Path,
    extractor: features.Extractor,
    x: torch.Tensor,
    seen_labels: torch.Tensor | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """KID and FID of the decoded samples of the tiny model against held-out images.

    Arguments:
        newest: the checkpoint of the VAE; the latents must be of it.
        x: held-out images, (N,C,H,W) in [-1, 1].
        seen_labels: classes of training images, (M,); samples have them in the same shares.

    Raises:
        InputError: where there are no latents, or those of another VAE.
    """
    folder = run.latents_of(recipe)
    latents.verify(folder)
    cache = latents.open_cache(folder)
    made_of = latents.read_fingerprint(cache.folder) or {}
    latents.refuse_if_stale(cache.folder, latents.fingerprint(newest, made_of.get("data", {})))
    config = _tiny_model(cache.split("train").shape)
    decoder = LatentDiffusionPipeline.from_vae(cache.folder).to(accelerator.device)
    sampling = replace(recipe.sampling, sampler="euler")
    stage = DiffusionStage(config, sampling, recipe.seed, cache, decoder, accelerator)
    with tempfile.TemporaryDirectory(prefix=".tmp-probe-", dir=run.path) as place:
        engine.fit(stage, StageFolder(Path(place) / "probe"), config, PROBE_STEPS, recipe.seed, accelerator)
    count = min(PROBE_IMAGES, len(x))
    labels = tasks.labels_like(seen_labels, cache.classes, count)
    real = extractor.all(x[splits.evenly(len(x), count)], accelerator.device, "held-out images")
    found = judge(extractor, real, labels, count, 0, 1.0, SAMPLER_STEPS, accelerator)(stage.pipeline())
    return {
        "extractor": extractor.name,
        "images": count,
        "steps": PROBE_STEPS,
        "kid": found["kid"],
        "kid_deviation": found["kid_deviation"],
        "fid": found["fid"],
    }


def _tiny_model(latent_shape: Sequence[int]) -> Stage2Config:
    """A network small enough for a minute on two cores, with two levels where the latents can be halved."""
    can_be_halved = all(side % 2 == 0 for side in latent_shape[1:])
    channels = [64, 128] if can_be_halved else [128]
    return Stage2Config(
        unet=UNetConfig(channels=channels, blocks_per_level=1, attention_levels=[]),
        batch_size=128,
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=30),
        ema=EmaConfig(decay=0.98),
        max_steps=PROBE_STEPS,
        save_every=PROBE_STEPS,
        validate_every=PROBE_STEPS,
        preview_every=2 * PROBE_STEPS,
    )
