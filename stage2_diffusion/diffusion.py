"""The path between data and noise, what the denoiser is asked for on it, and how times are drawn.

t lies in [0, 1] with t = 0 data and t = 1 noise; a network sees 1000 t. Does not depend on networks, nor on
where latents come from. Dimension key: B batch, c h w latents.
"""

import torch
from torch.nn import functional as F

from shared.sampling.schedulers import TIMESTEPS, training_scheduler
from stage2_diffusion.config import TimeConfig


def draw_times(config: TimeConfig, normal: torch.Tensor) -> torch.Tensor:
    """Times t in (0, 1) made of standard normal numbers n.

    logit_normal: t = sigmoid(mean + std n); uniform: t = Phi(n), the normal's own distribution function.

    Arguments:
        config: kind, mean and std.
        normal: (B,).

    Returns:
        t, (B,).

    References:
        Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    if config.kind == "uniform":
        return torch.special.ndtr(normal)
    return torch.sigmoid(config.mean + config.std * normal)


class Flow:
    """Rectified flow: z_t = (1 - t) z + t noise; the network gives the velocity noise - z.

    References:
        Liu et al. 2022, arXiv:2209.03003, equation 1.
    """

    def noised(
        self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A point of the path and what the network is asked for there.

        Arguments:
            z: normalised latents, (B,c,h,w).
            noise: standard normal, (B,c,h,w).
            t: times in [0, 1], (B,).

        Returns:
            z_t, (B,c,h,w); the network's target, (B,c,h,w); the timesteps that it sees, (B,).
        """
        at = t.view(-1, 1, 1, 1)
        return (1 - at) * z + at * noise, noise - z, t * TIMESTEPS


class DDPM:
    """A variance-preserving path: z_t = alpha_t z + sigma_t noise, alpha_t^2 + sigma_t^2 = 1.

    The network gives the noise (epsilon) or alpha_t noise - sigma_t z (v).

    References:
        Ho et al. 2020, arXiv:2006.11239, equation 4 (the path) and 14 (epsilon).
        Salimans & Ho 2022, arXiv:2202.00512, section 4 (v).
    """

    def __init__(self, objective: str):
        self.objective = objective
        self.scheduler = training_scheduler(objective)

    def noised(
        self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Flow.noised; t is rounded down to one of 1000 steps."""
        steps = (t * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        z_t = self.scheduler.add_noise(z, noise, steps)
        target = noise if self.objective == "epsilon" else self.scheduler.get_velocity(z, noise, steps)
        return z_t, target, steps


def make_path(objective: str) -> Flow | DDPM:
    """The path of an objective: flow, epsilon or v."""
    return Flow() if objective == "flow" else DDPM(objective)


def denoising_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each latent, (B,c,h,w) -> (B,): the term of stage 2 before it is averaged."""
    return F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)


def drop_labels(labels: torch.Tensor, uniform: torch.Tensor, rate: float, null_label: int) -> torch.Tensor:
    """Labels (B,), replaced by the null label where uniform (B,) < rate, for guidance away from no class.

    References:
        Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    return torch.where(uniform < rate, null_label, labels)
