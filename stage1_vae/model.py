"""The VAE: a deep convolutional encoder and decoder around a Gaussian (or deterministic) latent of any shape.

And a pretrained autoencoder of diffusers with the same methods. Diffusers models that stand on their own:
they take pixels in [-1, 1], and do not depend on data or losses. An exported pipeline carries a copy of this
file. Dimension key: B batch, C image channels, H W pixels, f h'
w' features of the last stage, c h w latents, dz = c*h*w.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from .layers import ACTIVATIONS, BLOCKS, down, heads, tiled, up

OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "none": lambda y: y,
    "relu": torch.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.01),
}
PRETRAINED = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
MOST_PIXELS = 2**20  # of images taken at once: at full size a network makes a hundred channels of them
LOGVAR_RANGE = (-30.0, 20.0)  # exp of it stays a finite number in every precision


class Autoencoder(ModelMixin, AutoencoderMixin, ConfigMixin, ABC):
    """What every first stage offers, with the methods and names of diffusers' autoencoders.

    A subclass gives `moments`, `logits` and, in its config, `latent_shape`, `posterior` and
    `output_activation`. enable_slicing() takes images one by one; enable_tiling() in overlapping tiles of the
    size that was trained at, so that images may be larger; enable_gradient_checkpointing() computes the
    insides of layers again in the backward pass (Chen et al. 2016, arXiv:1604.06174).
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False
    use_slicing = False
    use_tiling = False

    @property
    def config(self) -> Any:
        """The configuration, and what autoencoders of diffusers call parts of it."""
        return FrozenDict({**self.names, **self._internal_dict})

    @property
    @abstractmethod
    def names(self) -> dict[str, Any]:
        """out_channels, latent_channels, sample_size and block_out_channels."""

    @property
    def deterministic(self) -> bool:
        return self._internal_dict["posterior"] == "deterministic"

    @abstractmethod
    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z|x), each (B,c,h,w). The log-variance stays within [-30, 20]."""

    @abstractmethod
    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of latents (B,c,h,w), before the output activation: (B,C,H,W).

        Of a hurdle gates and values, (B,2C,H,W).
        """

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] of logits; of gates and values (B,2C,H,W) -1 where a gate is shut."""
        kind = self._internal_dict["output_activation"]
        if kind != "hurdle":
            return 2 * OUTPUTS[kind](logits.float()) - 1
        gate, value = logits.float().chunk(2, dim=1)
        return 2 * torch.where(gate > self.gate_threshold, value.clamp_min(0), 0.0) - 1

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """q(z|x) as a diffusers distribution: .mean, .logvar, .sample(generator), .mode()."""
        sides, latents = self._sides
        moments = self._in_parts(lambda part: torch.cat(self.moments(part), dim=1), x, sides, latents)
        posterior = DiagonalGaussianDistribution(moments, deterministic=self.deterministic)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Pixels (B,C,H,W) of latents (B,c,h,w). Nothing is drawn: others' calls hand a generator over."""
        sides, latents = self._sides
        x_hat = self._in_parts(lambda part: self.activate(self.logits(part)), z, latents, sides)
        return DecoderOutput(sample=x_hat) if return_dict else (x_hat,)

    @property
    def _sides(self) -> tuple[Any, Any]:
        """Height and width of images and of latents, as trained."""
        size = self.names["sample_size"]
        return [size] * 2 if isinstance(size, int) else size, self._internal_dict["latent_shape"][1:]

    def _in_parts(self, function: Any, x: torch.Tensor, tile: Any, made: Any) -> torch.Tensor:
        """function(x) of MOST_PIXELS at once at most; of one image with slicing, tile by tile with tiling."""
        pixels = math.prod(x.shape[2:]) * max(1, math.prod(made) // math.prod(tile))  # of an image
        images = x.split(1 if self.use_slicing else max(1, MOST_PIXELS // pixels))
        if self.use_tiling:
            return torch.cat([tiled(function, image, tile, made) for image in images])
        return torch.cat([function(image) for image in images]) if len(images) > 1 else function(x)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
    ) -> Any:
        """Reconstructions, as diffusers' autoencoders give them; with noise, what training asks for.

        Training's is a reparametrised pass, z = mean + exp(logvar / 2) noise.

        Arguments:
            sample: pixels in [-1, 1], (B,C,H,W).
            sample_posterior: decode a draw from q(z|x) in place of its mean.
            return_dict: a DecoderOutput, else a tuple.
            generator: of that draw.
            noise: standard normal, (B,c,h,w); unused by an autoencoder.

        Returns:
            Pixels (B,C,H,W); with noise the decoder's output before its activation, (B,C,H,W), mean and
            log-variance, each (B,c,h,w).

        References:
            Kingma & Welling 2014, arXiv:1312.6114, section 2.4.
        """
        if noise is None:
            posterior = self.encode(sample).latent_dist
            z = posterior.sample(generator) if sample_posterior else posterior.mode()
            return self.decode(z, return_dict=return_dict)
        mean, logvar = self.moments(sample)
        z = mean if self.deterministic else mean + (0.5 * logvar).exp() * noise
        return self.logits(z), mean, logvar


class DeepVAE(Autoencoder):
    """A VAE with one stride-2 stage per entry of `channels`, each followed by `blocks_per_level` blocks.

    Pixels are (B, in_channels, H, W) in [-1, 1], image_size = H = W or [H, W]; latents (B, *latent_shape).
    `head` makes mean and log-variance of the features: `linear` by two fully connected layers (behind one of
    `hidden_dim`, if given; if not, they begin local where latents have the sides of the features), `conv` by
    a convolution, whose pixels are folded into channels where the latents have shorter sides than the
    features, `identity` not at all (deterministic only). The output activation acts in [0, 1]; decode maps it
    by 2y - 1. With `hurdle` the decoder gives each cell a gate and a value.
    `latents_mean` and `latents_std`, one number for each channel or element, are there for others, as
    autoencoders of diffusers have them: the pipeline normalises by its codec, which has the same numbers, and
    nothing is scaled beyond that.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        image_size: int | list[int] = 128,
        channels: tuple[int, ...] = (64, 128, 256, 64),
        blocks_per_level: int = 1,
        block: str = "resnet",
        activation: str = "silu",
        norm: str = "group",
        downsample: str = "stride",
        upsample: str = "transposed",
        latent_shape: tuple[int, int, int] = (8, 8, 8),
        head: str = "linear",
        hidden_dim: int | None = None,
        posterior: str = "gaussian",
        output_activation: str = "sigmoid",
        scaling_factor: float = 1.0,
        latents_mean: list | None = None,
        latents_std: list | None = None,
    ):
        super().__init__()

        def blocks(width: int) -> list[nn.Module]:
            return [BLOCKS[block](width, norm, activation) for _ in range(blocks_per_level)]

        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            encoder += [down(downsample, before, after, activation), *blocks(after)]
        for before, after in zip(reversed(channels), [*reversed(channels[:-1]), channels[0]], strict=True):
            decoder += [*blocks(before), up(upsample, before, after), ACTIVATIONS[activation]()]
        self.encoder = nn.Sequential(*encoder)  # (B,C,H,W) -> (B,f,h',w')
        hurdle = output_activation == "hurdle"
        last = nn.Conv2d(channels[0], in_channels * (2 if hurdle else 1), 3, padding=1)
        self.decoder = nn.Sequential(*decoder, last)  # (B,f,h',w') -> (B,C,H,W)
        if hurdle:  # a gate is open above it; set_threshold learns it
            self.register_buffer("gate_threshold", torch.zeros(in_channels, 1, 1))
        height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
        scale = 2 ** len(channels)
        features = (channels[-1], height // scale, width // scale)
        moments = 1 if posterior == "deterministic" else 2  # mean, log-variance
        self.to_moments, self.from_latent = heads(
            head, features, latent_shape, moments, hidden_dim, activation
        )

    @property
    def names(self) -> dict[str, Any]:
        own = self._internal_dict
        height = own["image_size"] if isinstance(own["image_size"], int) else own["image_size"][0]
        halvings = round(math.log2(height / own["latent_shape"][1]))  # of the sides, from images to latents
        widths = [own["channels"][0], *own["channels"], *[own["channels"][-1]] * halvings]
        return {
            "out_channels": own["in_channels"],
            "latent_channels": own["latent_shape"][0],
            "sample_size": own["image_size"],
            "block_out_channels": widths[: halvings + 1],
        }

    @torch.no_grad()
    def set_threshold(self, gates: torch.Tensor, x: torch.Tensor) -> None:
        """Open as many gates (N,C,H,W) as cells of images (N,C,H,W) in [-1, 1] are not empty, by channel."""
        for channel, (gate, cells) in enumerate(zip(gates.unbind(1), x.unbind(1), strict=True)):
            shut = int((cells <= -1).sum())
            ordered = gate.flatten().sort().values
            self.gate_threshold[channel] = ordered[shut - 1] if shut else ordered[0] - 1

    def enable_tiling(self) -> None:
        """Raises ValueError for a head that sees the whole image."""
        if self._internal_dict["head"] == "linear":
            raise ValueError("enable_tiling: a linear head sees the whole image; head: conv has tiles")
        super().enable_tiling()

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = self.to_moments(
            self._through(self.encoder, x)
        ).float()  # (B,2c,h,w), or (B,c,h,w) of an autoencoder
        if self.deterministic:
            return moments, torch.full_like(moments, LOGVAR_RANGE[0])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        return self._through(self.decoder, self.from_latent(z))

    def _through(self, layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return layers(x)
        for layer in layers:
            x = self._gradient_checkpointing_func(layer, x)
        return x


class PretrainedVAE(Autoencoder):
    """An autoencoder of diffusers, with the methods of the first stage.

    Arguments:
        kind: AutoencoderKL, AutoencoderTiny or AutoencoderDC; the latter two are deterministic.
        settings: its configuration, as diffusers writes it.
        latent_shape: (c,h,w) of its latents, for the images of the recipe.
        posterior, output_activation: as DeepVAE's; its output is pixels already.
        scaling_factor, latents_mean, latents_std: as DeepVAE's.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        settings: dict[str, Any],
        latent_shape: tuple[int, int, int],
        posterior: str = "gaussian",
        output_activation: str = "none",
        scaling_factor: float = 1.0,
        latents_mean: list | None = None,
        latents_std: list | None = None,
    ):
        super().__init__()
        if kind not in PRETRAINED:
            raise ValueError(f"{kind} is none of {', '.join(PRETRAINED)}")
        self.network = getattr(diffusers, kind).from_config(settings)

    @property
    def names(self) -> dict[str, Any]:
        own, settings = self._internal_dict, self._internal_dict["settings"]
        widths = settings.get("block_out_channels") or settings["encoder_block_out_channels"]
        return {
            "in_channels": settings["in_channels"],
            "out_channels": settings.get("out_channels", settings["in_channels"]),
            "latent_channels": own["latent_shape"][0],
            "sample_size": [side * 2 ** (len(widths) - 1) for side in own["latent_shape"][1:]],
            "block_out_channels": widths,
        }

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.network.encode(x, return_dict=False)[0]
        if self.deterministic:
            return found.float(), torch.full_like(found, LOGVAR_RANGE[0], dtype=torch.float32)
        return found.mean.float(), found.logvar.float()

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        return (self.network.decode(z, return_dict=False)[0] + 1) / 2
