"""How strongly the KL term pulls: its weight over the training, its floor or its target, and what that weight means.

Pure functions; knows no model and no data. Dimension key: B batch, c h w latents.
"""

import math

import torch

from stage1_vae.config import KLConfig


def kl_weight(beta: float, config: KLConfig, step: int, max_steps: int) -> float:
    """The weight of the KL term at a step.

    constant: beta. linear, cosine: a rise from 0 over the first warmup_steps. cyclical: `cycles` equal cycles over the
    training, each a linear rise over its first `ratio` and then beta (Fu et al. 2019, arXiv:1903.10145, eq. 6).
    """
    if config.kind == "constant":
        return beta
    if config.kind == "cyclical":
        period = max_steps / config.cycles
        return beta * min(1.0, (step % period) / period / config.ratio)
    progress = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return beta * (progress if config.kind == "linear" else 0.5 * (1 - math.cos(math.pi * progress)))


def kl_per_dimension(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats, (B,c,h,w) (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def kl_term(mean: torch.Tensor, logvar: torch.Tensor, free_bits: float = 0.0, target: float | None = None) -> torch.Tensor:
    """The KL term: the mean over images and latent dimensions, in nats, of moments (B,c,h,w).

    free_bits: a dimension whose mean over the batch is below this many nats costs this much, so nothing is won by
    emptying it (Kingma et al. 2016, arXiv:1606.04934, eq. 15). target: the distance |KL - target| from so many nats per
    dimension (Burgess et al. 2018, arXiv:1804.03599, eq. 8).
    """
    nats = kl_per_dimension(mean, logvar).mean(0)  # (c,h,w)
    kl = nats.clamp_min(free_bits).mean() if free_bits else nats.mean()
    return kl if target is None else (kl - target).abs()


def effective_beta(beta: float, pixels: int, dz: int, reconstruction_weight: float) -> float:
    """beta against an ELBO that sums over pixels and latent dimensions (Higgins et al. 2017, eq. 4).

    Our terms are means, per pixel and per latent dimension: w mean_p(rec) + beta mean_d(kl) is proportional to
    sum_p(rec) + [beta pixels / (dz w)] sum_d(kl).
    """
    return beta * pixels / (dz * reconstruction_weight)
