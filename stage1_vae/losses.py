"""The terms of stage 1: a dictionary of unweighted scalar means; and what weight the KL has at a step.

Pixel terms are means over images and pixels; kl is the mean over images and latent dimensions, in nats.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional as F

from shared.show.grids import on_white
from stage1_vae.config import MS_SSIM_WINDOW, KLConfig, Stage1Config
from stage1_vae.discriminator import adversarial_term

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli & Bovik 2003, section 3.2

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Discriminator = Callable[[torch.Tensor], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Reconstruction:
    """One pass of the VAE.

    x, x_hat: pixels (B,C,H,W) in [-1, 1]
    logits: the decoder's output before its activation, (B,C,H,W); of a hurdle (B,2C,H,W)
    mean, logvar: of the posterior, (B,c,h,w)
    """

    x: torch.Tensor
    logits: torch.Tensor
    x_hat: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor


def terms(
    seen: Reconstruction,
    weights: Mapping[str, float],
    config: Stage1Config,
    lpips: Perceptual | None = None,
    discriminator: Discriminator | None = None,
    whole: Reduce | None = None,
) -> dict[str, torch.Tensor]:
    """The terms whose weight is not zero, each a scalar.

    lpips and discriminator are needed where their terms' weights are not zero; whole makes the mean over a
    process's images that over all processes, for what is no mean itself.
    """
    x, x_hat = seen.x, seen.x_hat
    found = {}
    if weights["l1"]:
        found["l1"] = F.l1_loss(x_hat, x)
    if weights["mse"]:
        found["mse"] = F.mse_loss(x_hat, x)
    if weights["bce"]:
        found["bce"] = bce_term(seen.logits, x)
    if weights["weighted_mse"]:
        found["weighted_mse"] = weighted_mse_term(x_hat, x, config.activity_weight)
    if weights["hurdle"]:
        found["hurdle"] = hurdle_term(seen.logits, x, config.activity_weight)
    if weights["ms_ssim"]:
        found["ms_ssim"] = ms_ssim_term(x_hat, x)
    if weights["lpips"]:
        assert lpips is not None
        found["lpips"] = lpips_term(lpips, x_hat, x, config.lpips.channels)
    if weights["adversarial"]:
        assert discriminator is not None
        found["adversarial"] = adversarial_term(discriminator(x_hat))
    if weights["kl"]:
        control = config.kl_schedule
        found["kl"] = kl_term(seen.mean, seen.logvar, control.free_bits, control.target, whole)
    return found


def bce_term(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits and pixels in [-1, 1], both (B,C,H,W); a mean.

    What lies beyond is clipped: of a target above 1 the error would fall for ever as its logit grows.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), ((x + 1) / 2).clamp(0, 1))


def pixel_weights(x: torch.Tensor, activity_weight: float) -> torch.Tensor:
    """1 + activity_weight * y, with y = (x + 1) / 2 in [0, 1]: what is lit counts more."""
    return 1 + activity_weight * ((x + 1) / 2).clamp(0, 1)


def weighted_mse_term(x_hat: torch.Tensor, x: torch.Tensor, activity_weight: float) -> torch.Tensor:
    """Mean squared error in which every pixel has its weight."""
    return (pixel_weights(x, activity_weight) * (x_hat - x).square()).mean()


def hurdle_term(logits: torch.Tensor, x: torch.Tensor, value_weight: float) -> torch.Tensor:
    """The error of gates and values: of cells that are empty with a probability, else normal around a value.

    With y = (x + 1) / 2, o = [y > 0], gate g and value v it is the mean of BCE(g, o) + w o (v - y)^2: but for
    constants the negative log-likelihood of a hurdle model whose values have a variance of 1 / (2 w).

    Arguments:
        logits: gates and values, (B,2C,H,W).
        x: pixels in [-1, 1], (B,C,H,W); -1 is empty.
        value_weight: w.

    Returns:
        A scalar.

    References:
        Cragg 1971, Econometrica 39(5), equations 5 and 7 (a normal instead of its truncation).
    """
    gate, value = logits.float().chunk(2, dim=1)
    y = (x.float() + 1) / 2
    occupied = (y > 0).float()
    shut_or_open = F.binary_cross_entropy_with_logits(gate, occupied)
    return shut_or_open + value_weight * (occupied * (value - y).square()).mean()


def ms_ssim_scales(size: int) -> int:
    """How many scales fit `size` pixels: each halves them, and the last must hold the 11-pixel window.

    torchmetrics asks for room in size / (scales - 1)^2, which is more where there are four.
    """
    shrunk = {n: size // max(2 ** (n - 1), (n - 1) ** 2) for n in range(2, 6)}
    return max([1, *(n for n, left in shrunk.items() if left >= MS_SSIM_WINDOW)])


def ms_ssim_term(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """1 - MS-SSIM of pixels in [-1, 1].

    Below 176 px there are fewer scales than five, and their weights are brought to sum 1.

    Arguments:
        x_hat, x: (B,C,H,W).

    Returns:
        A scalar in [0, 1]; 0 where the images are equal.

    References:
        Wang, Simoncelli & Bovik 2003, equation 7.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    weights = SCALE_WEIGHTS[: ms_ssim_scales(min(x.shape[-2:]))]
    betas = tuple(weight / sum(weights) for weight in weights)
    y_hat = (x_hat.float() + 1) / 2
    y = (x.float() + 1) / 2
    with torch.autocast(
        x.device.type, enabled=False
    ):  # its variances are differences: bfloat16 has no digits left
        return 1 - ms_ssim(y_hat, y, data_range=1.0, betas=betas, normalize="relu")


def lpips_term(network: Perceptual, x_hat: torch.Tensor, x: torch.Tensor, channels: str) -> torch.Tensor:
    """Mean LPIPS distance of pixels in [-1, 1] (Zhang et al. 2018, arXiv:1801.03924, equation 1).

    channels: `repeat` shows one channel three times, three as they are and RGBA laid on white; `each` shows
    every channel by itself.
    """
    if channels == "each":
        x_hat = rearrange(x_hat, "b c h w -> (b c) 1 h w")
        x = rearrange(x, "b c h w -> (b c) 1 h w")
    x_hat, x = (on_white(part).expand(-1, 3, -1, -1) for part in (x_hat, x))
    return network(x_hat, x).mean()


# ---------------------------------------------------------------- the KL: its weight, floor or target


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
    mean: torch.Tensor,
    logvar: torch.Tensor,
    free_bits: float = 0.0,
    target: float | None = None,
    whole: Reduce | None = None,
) -> torch.Tensor:
    """The KL term: the mean over images and latent dimensions, with a floor or a target.

    With k_j the mean over the batch of dimension j: mean_j k_j; with free bits mean_j max(k_j, free_bits), so
    that nothing is won by emptying a dimension below it; with a target |mean_j k_j - target|. These two are
    no means, so that k_j has to be that of the whole batch, over all processes.

    Arguments:
        mean: (B,c,h,w).
        logvar: log sigma^2, (B,c,h,w).
        free_bits: nats per dimension.
        target: nats per dimension.
        whole: makes a mean over this process's images that over all processes; None: it is.

    Returns:
        Nats per dimension, a scalar.

    References:
        Kingma et al. 2016, arXiv:1606.04934, equation 15 (free bits).
        Burgess et al. 2018, arXiv:1804.03599, equation 8 (target).
    """
    nats = kl_per_dimension(mean, logvar).mean(0)  # (c,h,w)
    if whole and (free_bits or target is not None):
        nats = whole(nats)
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
