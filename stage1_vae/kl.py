"""How strongly the KL term pulls: its weight over the training, and what that weight means.

A pure function of the step; knows no model and no data.
"""

from stage1_vae.config import KLScheduleConfig


def kl_weight(beta: float, schedule: KLScheduleConfig, step: int) -> float:
    """The weight of the KL term at a step: beta, or a linear rise from 0 over the first warmup_steps."""
    if schedule.kind == "linear" and step < schedule.warmup_steps:
        return beta * step / schedule.warmup_steps
    return beta


def effective_beta(beta: float, pixels: int, dz: int, reconstruction_weight: float) -> float:
    """beta against an ELBO that sums over pixels and latent dimensions (Higgins et al. 2017, eq. 4).

    Our terms are means, per pixel and per latent dimension: w mean_p(rec) + beta mean_d(kl) is proportional to
    sum_p(rec) + [beta pixels / (dz w)] sum_d(kl).
    """
    return beta * pixels / (dz * reconstruction_weight)
