"""The discriminator of the adversarial term: it judges overlapping patches, not whole images.

Knows pixels in [-1, 1], nothing of the VAE. Dimension key: B batch, C image channels, H W pixels, p q patches.
"""

import torch
from torch import nn
from torch.nn import functional as F

from stage1_vae.config import DiscriminatorConfig


class PatchDiscriminator(nn.Sequential):
    """Strided 4x4 convolutions, one per entry of `channels`, and a logit for each patch (Isola et al. 2017, arXiv:1611.07004,
    section 3.2.2): (B,C,H,W) -> (B,1,p,q). Group normalisation: batch statistics would differ between processes."""

    def __init__(self, in_channels: int, channels: list[int]):
        layers = []
        for index, (inside, outside) in enumerate(zip([in_channels, *channels], channels, strict=False)):
            norm = [nn.GroupNorm(1, outside)] if index else []
            layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), *norm, nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 3, padding=1))


def adversarial_term(fake: torch.Tensor) -> torch.Tensor:
    """What the VAE pays: minus the mean logit of its reconstructions' patches (Lim & Ye 2017, arXiv:1705.02894)."""
    return -fake.float().mean()


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """What the discriminator pays: logits above 1 for images and below -1 for reconstructions cost nothing more."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adversarial_weight(weight: float, config: DiscriminatorConfig, step: int) -> float:
    """The weight of the adversarial term: 0 before start_step, then a linear rise over ramp_steps."""
    if step < config.start_step:
        return 0.0
    return weight * min(1.0, (step - config.start_step + 1) / (config.ramp_steps + 1))
