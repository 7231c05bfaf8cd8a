"""The denoiser: a diffusers UNet2DModel shaped by the recipe. Does not depend on how latents are noised.

Dimension key: B batch, c h w latents.
"""

import math

from diffusers import UNet2DModel

from stage2_diffusion.config import UNetConfig


def make_unet(config: UNetConfig, latent_shape: tuple[int, int, int], num_classes: int) -> UNet2DModel:
    """A UNet for latents (B,c,h,w); with classes it has one embedding more, the last, for the null label."""
    channels, height, width = latent_shape
    attention = [level in config.attention_levels for level in range(len(config.channels))]
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.blocks_per_level,
        down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
        up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
        attention_head_dim=config.head_dim,
        norm_num_groups=math.gcd(32, *config.channels),
        dropout=config.dropout,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )
