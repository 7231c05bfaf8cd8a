"""The terms of stage 1: a dictionary of unweighted scalar means. What weighs how much is not known here.

Pixel terms are means over images and pixels; kl is the mean over images and latent dimensions, in nats.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

import torch
from einops import rearrange
from torch.nn import functional as F

from stage1_vae.config import Stage1Config
from stage1_vae.discriminator import adversarial_term
from stage1_vae.kl import kl_term

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli & Bovik 2003, section 3.2
WINDOW = 11


def pixel_weights(x: torch.Tensor, activity_weight: float) -> torch.Tensor:
    """1 + activity_weight * y, with y = (x + 1) / 2 in [0, 1]: what is lit counts more."""
    return 1 + activity_weight * ((x + 1) / 2).clamp(0, 1)


def weighted_mse_term(x_hat: torch.Tensor, x: torch.Tensor, activity_weight: float) -> torch.Tensor:
    """Mean squared error in which every pixel has its weight."""
    return (pixel_weights(x, activity_weight) * (x_hat - x).square()).mean()


def ms_ssim_scales(size: int) -> int:
    """How many scales fit images of so many pixels: each halves them, and the last must hold the 11-pixel window."""
    return max(n for n in range(1, 6) if n == 1 or size // 2 ** (n - 1) >= WINDOW)


def ms_ssim_term(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """1 - MS-SSIM of pixels in [-1, 1]; below 176 px with fewer scales than five, their weights brought to sum 1."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    weights = SCALE_WEIGHTS[: ms_ssim_scales(x.shape[-1])]
    betas = tuple(w / sum(weights) for w in weights)
    with torch.autocast(x.device.type, enabled=False):  # its variances are differences: bfloat16 has no digits for them
        return 1 - ms_ssim((x_hat.float() + 1) / 2, (x.float() + 1) / 2, data_range=1.0, betas=betas, normalize="relu")


def lpips_term(network, x_hat: torch.Tensor, x: torch.Tensor, channels: str) -> torch.Tensor:
    """Mean LPIPS distance (Zhang et al. 2018) of pixels in [-1, 1].

    channels: `repeat` shows one channel three times and three as they are; `each` shows every channel by itself.
    """
    if channels == "each":
        x_hat, x = (rearrange(images, "b c h w -> (b c) 1 h w") for images in (x_hat, x))
    return network(x_hat.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)).mean()


def terms(
    x, logits, x_hat, mean, logvar, weights: dict[str, float], config: Stage1Config, lpips=None, discriminator=None
) -> dict[str, torch.Tensor]:
    """The terms whose weight is not zero.

    x, x_hat: pixels (B,C,H,W) in [-1, 1]; logits: the decoder's output before its sigmoid; mean, logvar: (B,c,h,w);
    lpips, discriminator: networks, needed where the weights of lpips and adversarial are not zero.
    """
    control = config.kl_schedule
    compute = {
        "l1": lambda: F.l1_loss(x_hat, x),
        "mse": lambda: F.mse_loss(x_hat, x),
        "bce": lambda: F.binary_cross_entropy_with_logits(logits.float(), (x + 1) / 2),
        "weighted_mse": lambda: weighted_mse_term(x_hat, x, config.activity_weight),
        "ms_ssim": lambda: ms_ssim_term(x_hat, x),
        "lpips": lambda: lpips_term(lpips, x_hat, x, config.lpips.channels),
        "adversarial": lambda: adversarial_term(discriminator(x_hat)),
        "kl": lambda: kl_term(mean, logvar, control.free_bits, control.target),
    }
    return {name: term() for name, term in compute.items() if weights[name]}
