"""The one place that builds a pipeline with a denoiser; and how one is let sample otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.config import InputError
from shared.sampling.config import SAMPLERS, SamplingConfig
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import PREDICTIONS, make_scheduler
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
        sampling: the recipe's.
    """
    mean, std = (_plain(codec.config[name]) for name in ("mean", "std"))
    decoder.vae.register_to_config(latents_mean=mean, latents_std=std)
    return LatentDiffusionPipeline(
        decoder.vae,
        **networks,
        scheduler=make_scheduler(objective, sampling.sampler, sampling.shift),
        codec=codec.config,
        value_transform=decoder.config.value_transform,
        classes=list(classes),
        guidance_interval=sampling.guidance_interval,
        sampling={
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "unconditional_guide": sampling.unconditional_guide,
        },
    )


def _plain(numbers: list) -> list:
    """One number for each channel where (c,1,1) has no more; else as it is."""
    first = numbers[0]
    alone = isinstance(first, list) and len(first) == len(first[0]) == 1
    return [channel[0][0] for channel in numbers] if alone else numbers


def change_sampling(
    pipe: LatentDiffusionPipeline, sampler: str | None, guidance_interval: Sequence[float] | None
) -> None:
    """Another sampler on the path of the denoiser, another guidance interval; None: as it is.

    Raises InputError where the sampler does not fit.
    """
    if guidance_interval:
        pipe.register_to_config(guidance_interval=list(guidance_interval))
    if sampler is None:
        return
    if pipe.scheduler is None:
        raise InputError("--sampler: without a stage 2 samples come from the VAE's prior, by no sampler")
    objectives = {name: objective for objective, name in PREDICTIONS.items()}
    objective = objectives.get(getattr(pipe.scheduler.config, "prediction_type", ""), "flow")
    if sampler not in SAMPLERS[objective]:
        fitting = " or ".join(SAMPLERS[objective])
        raise InputError(f"--sampler: {sampler} does not fit objective {objective}; take {fitting}")
    now = pipe.scheduler.config
    pipe.scheduler = make_scheduler(objective, sampler, now.get("shift", now.get("flow_shift", 1.0)))
