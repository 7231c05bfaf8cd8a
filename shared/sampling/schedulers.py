"""Which diffusers scheduler a recipe's sampler means. The sampling loop itself is the pipeline's: there is one."""

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)

from stage2_diffusion.diffusion import make_path

SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
}


def make_scheduler(objective: str, sampler: str) -> SchedulerMixin:
    """The scheduler of a sampler, on the same path as the training."""
    path = make_path(objective).scheduler
    if objective == "flow" and sampler == "dpmpp":  # a multistep solver of second order: no more evaluations than Euler
        return DPMSolverMultistepScheduler(path.config.num_train_timesteps, prediction_type="flow_prediction", use_flow_sigmas=True)
    return SCHEDULERS[sampler].from_config(path.config)
