"""The terms of stage 1: a dictionary of unweighted scalar means. What weighs how much is not known here.

Pixel terms are means over images and pixels; kl is the mean over images and latent dimensions, in nats.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

import torch
from einops import rearrange
from torch.nn import functional as F


def kl_term(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats per latent dimension (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def lpips_term(network, x_hat: torch.Tensor, x: torch.Tensor, channels: str) -> torch.Tensor:
    """Mean LPIPS distance (Zhang et al. 2018) of pixels in [-1, 1].

    channels: `repeat` shows one channel three times and three as they are; `each` shows every channel by itself.
    """
    if channels == "each":
        x_hat, x = (rearrange(images, "b c h w -> (b c) 1 h w") for images in (x_hat, x))
    return network(x_hat.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)).mean()


def terms(x, logits, x_hat, mean, logvar, weights: dict[str, float], lpips=None, lpips_channels="repeat") -> dict[str, torch.Tensor]:
    """The terms whose weight is not zero.

    x, x_hat: pixels (B,C,H,W) in [-1, 1]; logits: the decoder's output before its sigmoid; mean, logvar: (B,c,h,w);
    lpips: the perceptual network, needed where its weight is not zero.
    """
    compute = {
        "l1": lambda: F.l1_loss(x_hat, x),
        "mse": lambda: F.mse_loss(x_hat, x),
        "bce": lambda: F.binary_cross_entropy_with_logits(logits.float(), (x + 1) / 2),
        "lpips": lambda: lpips_term(lpips, x_hat, x, lpips_channels),
        "kl": lambda: kl_term(mean, logvar),
    }
    return {name: term() for name, term in compute.items() if weights[name]}
