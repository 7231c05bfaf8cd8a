"""The paths between data and noise as diffusers' schedulers: those of training, and those of each sampler.

The sampling loop itself is the pipeline's: there is one. Does not depend on any network.
"""

from typing import Any

import diffusers
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from shared.sampling.config import SAMPLERS

TIMESTEPS = 1000
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # objective -> diffusers' name


def training_scheduler(objective: str) -> Any:
    """The path of an objective.

    flow: the straight one. epsilon, v: the variance-preserving schedule of Rombach et al. 2022,
    arXiv:2112.10752.
    """
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift=1.0)
    return DDPMScheduler(
        TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=PREDICTIONS[objective],
        clip_sample=False,
        timestep_spacing="trailing",
    )


def make_scheduler(objective: str, sampler: str, shift: float = 1.0) -> Any:
    """The scheduler of a sampler, on the same path as the training.

    Arguments:
        objective: what the network predicts.
        sampler: one of the objective's SAMPLERS.
        shift: s; of flow, the steps' times t become s t / (1 + (s - 1) t).

    References:
        Esser et al. 2024, arXiv:2403.03206, equation 23 (the shift).
    """
    if objective == "flow" and sampler == "dpmpp":
        # A multistep solver of second order: as many evaluations as Euler.
        return DPMSolverMultistepScheduler(
            TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    kind = getattr(diffusers, SAMPLERS[objective][sampler])
    moved = {"shift": shift} if objective == "flow" else {}
    return kind.from_config(training_scheduler(objective).config, **moved)
