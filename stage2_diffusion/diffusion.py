"""The path between data and noise, what the denoiser is asked for on it, and how times are drawn.

t lies in [0, 1] with t = 0 data and t = 1 noise; a network sees 1000 t. Knows no network and no latents' origin.
Dimension key: B batch, c h w latents.
"""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from stage2_diffusion.config import TimeConfig

TIMESTEPS = 1000


def draw_times(config: TimeConfig, normal: torch.Tensor) -> torch.Tensor:
    """Times t (B,) in (0, 1) from standard normal numbers (B,).

    logit_normal: t = sigmoid(mean + std n) (Esser et al. 2024, arXiv:2403.03206, section 3.1); uniform: the normal's own
    distribution function.
    """
    if config.kind == "uniform":
        return torch.special.ndtr(normal)
    return torch.sigmoid(config.mean + config.std * normal)


class Flow:
    """Rectified flow (Liu et al. 2022, arXiv:2209.03003): z_t = (1 - t) z + t noise; the network gives the velocity noise - z."""

    def __init__(self):
        self.scheduler = FlowMatchEulerDiscreteScheduler(TIMESTEPS, shift=1.0)

    def noised(self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor):
        """z_t (B,c,h,w), the target of the network (B,c,h,w) and the timesteps it sees (B,)."""
        at = t.view(-1, 1, 1, 1)
        return (1 - at) * z + at * noise, noise - z, t * TIMESTEPS


class DDPM:
    """A variance-preserving path, z_t = alpha_t z + sigma_t noise, on the schedule of Rombach et al. 2022, arXiv:2112.10752.

    The network gives the noise (Ho et al. 2020) or v = alpha_t noise - sigma_t z (Salimans & Ho 2022, arXiv:2202.00512).
    """

    def __init__(self, prediction_type: str):
        self.scheduler = DDPMScheduler(
            TIMESTEPS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
            clip_sample=False, timestep_spacing="trailing",
        )  # fmt: skip

    def noised(self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor):
        steps = (t * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        z_t = self.scheduler.add_noise(z, noise, steps)
        target = noise if self.scheduler.config.prediction_type == "epsilon" else self.scheduler.get_velocity(z, noise, steps)
        return z_t, target, steps


def make_path(objective: str) -> Flow | DDPM:
    """The path of an objective: flow, epsilon or v."""
    return Flow() if objective == "flow" else DDPM({"epsilon": "epsilon", "v": "v_prediction"}[objective])


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each latent, (B,): the term of stage 2 before it is averaged."""
    return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)


def drop_labels(labels: torch.Tensor, uniform: torch.Tensor, rate: float, null_label: int) -> torch.Tensor:
    """Labels (B,), replaced by the null label where uniform (B,) < rate: classifier-free guidance (Ho & Salimans 2022)."""
    return torch.where(uniform < rate, null_label, labels)
