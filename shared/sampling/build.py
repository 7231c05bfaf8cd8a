"""The one place that builds a pipeline with a denoiser: for previews, exports and a run's checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.sampling.config import SamplingConfig
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler
from shared.sampling.transforms import LatentCodec


def build_pipeline(
    decoder: LatentDiffusionPipeline,
    networks: Mapping[str, Any],
    codec: LatentCodec,
    classes: Sequence[str],
    objective: str,
    sampling: SamplingConfig,
) -> LatentDiffusionPipeline:
    """The pipeline that samples with a denoiser.

    Arguments:
        decoder: a pipeline of the VAE and the value transform alone.
        networks: `unet`, and `guide` where guidance leads away from an earlier checkpoint.
        codec: the statistics of the latents that the networks were trained on.
        classes: their names; none for a model without classes.
        objective: what the networks predict.
        sampling: the recipe's sampler and guidance interval.
    """
    return LatentDiffusionPipeline(
        decoder.vae,
        **networks,
        scheduler=make_scheduler(objective, sampling.sampler),
        codec=codec.config,
        value_transform=decoder.config.value_transform,
        classes=list(classes),
        guidance_interval=sampling.guidance_interval,
    )
