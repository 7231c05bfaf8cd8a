"""How strongly the KL term pulls: its weight over the training, its floor or target, what the weight means.

Pure functions. Does not depend on models or data. Dimension key: B batch, c h w latents.
"""

import math

import torch

from stage1_vae.config import KLConfig


def kl_weight(beta: float, config: KLConfig, step: int, max_steps: int) -> float:
    """The weight of the KL term at a step.

    constant: beta. linear, cosine: a rise from 0 over the first warmup_steps. cyclical: `cycles` equal cycles
    over the training, each a linear rise over its first `ratio` and then beta.

    Arguments:
        beta: the full weight.
        config: the schedule.
        step: the update, counted from 0.
        max_steps: the length of the training in updates, which cycles divide.

    References:
        Fu et al. 2019, arXiv:1903.10145, equation 6 (cyclical).
    """
    if config.kind == "constant":
        return beta
    if config.kind == "cyclical":
        period = max_steps / config.cycles
        return beta * min(1.0, (step % period) / period / config.ratio)
    progress = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return beta * (progress if config.kind == "linear" else 0.5 * (1 - math.cos(math.pi * progress)))


def kl_per_dimension(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) = (mean^2 + sigma^2 - 1 - log sigma^2) / 2 of each latent, in nats.

    Arguments:
        mean: (B,c,h,w).
        logvar: log sigma^2, (B,c,h,w).

    Returns:
        Nats, (B,c,h,w), at least 0.

    References:
        Kingma & Welling 2014, arXiv:1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def kl_term(
    mean: torch.Tensor, logvar: torch.Tensor, free_bits: float = 0.0, target: float | None = None
) -> torch.Tensor:
    """The KL term: the mean over images and latent dimensions, with a floor or a target.

    With k_j the mean over the batch of dimension j: mean_j k_j; with free bits mean_j max(k_j, free_bits), so
    that nothing is won by emptying a dimension below it; with a target |mean_j k_j - target|.

    Arguments:
        mean: (B,c,h,w).
        logvar: log sigma^2, (B,c,h,w).
        free_bits: nats per dimension.
        target: nats per dimension.

    Returns:
        Nats per dimension, a scalar.

    References:
        Kingma et al. 2016, arXiv:1606.04934, equation 15 (free bits).
        Burgess et al. 2018, arXiv:1804.03599, equation 8 (target).
    """
    nats = kl_per_dimension(mean, logvar).mean(0)  # (c,h,w)
    kl = nats.clamp_min(free_bits).mean() if free_bits else nats.mean()
    return kl if target is None else (kl - target).abs()


def effective_beta(beta: float, pixels: int, dz: int, reconstruction_weight: float) -> float:
    """beta against an ELBO that sums over pixels and latent dimensions.

    Our terms are means, per pixel and per latent dimension: w mean_p(rec) + beta mean_d(kl) is proportional
    to sum_p(rec) + [beta pixels / (dz w)] sum_d(kl).

    Arguments:
        beta: the weight between means.
        pixels: C H W.
        dz: c h w.
        reconstruction_weight: w, the sum of the weights of the pixel terms.

    References:
        Higgins et al. 2017 (beta-VAE), equation 4.
    """
    return beta * pixels / (dz * reconstruction_weight)
