"""The discriminator of the adversarial term: it sees overlapping patches, not whole images.

Takes pixels in [-1, 1]. Does not depend on the VAE. Dimension key: B batch, C image channels, H W pixels, p q
patches.
"""

import torch
from torch import nn
from torch.nn import functional as F

from stage1_vae.config import DiscriminatorConfig


class PatchDiscriminator(nn.Sequential):
    """Strided 4x4 convolutions, one per entry of `channels`, and a logit per patch: (B,C,H,W) -> (B,1,p,q).

    Isola et al. 2017, arXiv:1611.07004, section 3.2.2. Group normalisation: batch statistics would differ
    between processes.
    """

    def __init__(self, in_channels: int, channels: list[int]):
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
            if len(layers) > 1:  # the first layer sees the pixels as they are
                layers.append(nn.GroupNorm(1, after))
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 3, padding=1))


def adversarial_term(fake: torch.Tensor) -> torch.Tensor:
    """The VAE's adversarial loss: minus the mean logit of reconstructed patches, (B,1,p,q) -> a scalar.

    References:
        Lim & Ye 2017, arXiv:1705.02894 (geometric GAN).
    """
    return -fake.float().mean()


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss: (mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2.

    Arguments:
        real: logits of images, (B,1,p,q).
        fake: logits of reconstructions, (B,1,p,q).

    Returns:
        A scalar, 0 where all logits are on their side of the margin.

    References:
        Lim & Ye 2017, arXiv:1705.02894 (geometric GAN).
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adversarial_weight(weight: float, config: DiscriminatorConfig, step: int) -> float:
    """The weight of the adversarial term: 0 before start_step, then a linear rise over ramp_steps."""
    if step < config.start_step:
        return 0.0
    return weight * min(1.0, (step - config.start_step + 1) / (config.ramp_steps + 1))
