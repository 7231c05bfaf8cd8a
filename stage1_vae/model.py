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
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
}
OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "none": lambda y: y,
    "relu": torch.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.01),
}
PRETRAINED = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
LOGVAR_RANGE = (-30.0, 20.0)  # exp of it stays a finite number in every precision


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(32, channels), channels) if kind == "group" else nn.Identity()


class ResnetBlock(nn.Module):
    """Pre-activation residual block: x + conv(act(norm(conv(act(norm(x)))))).

    He et al. 2016, arXiv:1603.05027. The last convolution begins at zero, so that a deep stack begins as the
    identity.
    """

    def __init__(self, channels: int, norm: str, activation: str):
        super().__init__()
        first = nn.Conv2d(channels, channels, 3, padding=1)
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.layers = nn.Sequential(
            _norm(norm, channels), ACTIVATIONS[activation](), first,
            _norm(norm, channels), ACTIVATIONS[activation](), last,
        )  # fmt: skip
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # it has a bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class PlainBlock(nn.Sequential):
    """conv, norm, activation."""

    def __init__(self, channels: int, norm: str, activation: str):
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(convolution, _norm(norm, channels), ACTIVATIONS[activation]())


BLOCKS = {"resnet": ResnetBlock, "plain": PlainBlock}


class ShortcutDown(nn.Module):
    """Halve height and width: a strided convolution, plus a shortcut without parameters.

    Residual autoencoding (Chen et al. 2024, arXiv:2410.10733, section 3.2): every 2x2 block of pixels becomes
    four channels, and these are repeated, or averaged in groups, to out_channels. What fine detail needs is
    there from the first step on.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + _with_channels(F.pixel_unshuffle(x, 2), self.conv.out_channels)


class ShortcutUp(nn.Module):
    """Double height and width: the inverse of ShortcutDown, around a transposed convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + F.pixel_shuffle(_with_channels(x, 4 * self.conv.out_channels), 2)


def _with_channels(x: torch.Tensor, count: int) -> torch.Tensor:
    """x (B,f,H,W) with `count` channels: each repeated, or means of neighbouring ones.

    Where count does not divide f, the rest of the channels goes through the convolution alone.
    """
    f = x.shape[1]
    if f < count:
        return x.repeat_interleave(-(-count // f), dim=1)[:, :count]
    group = f // count
    return x[:, : group * count].unflatten(1, (count, group)).mean(2)


def _down(kind: str, in_channels: int, out_channels: int, activation: str) -> nn.Module:
    """Halve height and width: strided 3x3 convolution, that with a shortcut, or convolution and pooling."""
    if kind == "shortcut":
        return ShortcutDown(in_channels, out_channels)
    if kind == "stride":
        strided = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        return nn.Sequential(strided, ACTIVATIONS[activation]())
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(convolution, ACTIVATIONS[activation](), nn.MaxPool2d(2))


def _up(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """Double height and width. The transposed kernel is 4 wide, a multiple of the stride: no checkerboard."""
    if kind == "shortcut":
        return ShortcutUp(in_channels, out_channels)
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1))
    nearest = nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Sequential(nearest, nn.Conv2d(in_channels, out_channels, 3, padding=1))


class Autoencoder(ModelMixin, ConfigMixin, ABC):
    """What every first stage offers. A subclass gives `moments`, `logits` and, in its config, `latent_shape`,
    `posterior` and `output_activation`."""

    config_name = "config.json"

    @property
    def deterministic(self) -> bool:
        return self.config.posterior == "deterministic"

    @abstractmethod
    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z|x), each (B,c,h,w). The log-variance stays within [-30, 20]."""

    @abstractmethod
    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of latents (B,c,h,w), before the output activation: (B,C,H,W)."""

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] of logits."""
        return 2 * OUTPUTS[self.config.output_activation](logits.float()) - 1

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """q(z|x) as a diffusers distribution: .mean, .logvar, .sample(generator), .mode()."""
        moments = torch.cat(self.moments(x), dim=1)
        posterior = DiagonalGaussianDistribution(moments, deterministic=self.deterministic)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Pixels (B,C,H,W) of latents (B,c,h,w)."""
        x_hat = self.activate(self.logits(z))
        return DecoderOutput(sample=x_hat) if return_dict else (x_hat,)

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, mean and log-variance of a reparametrised pass: z = mean + exp(logvar / 2) noise.

        Arguments:
            x: pixels in [-1, 1], (B,C,H,W).
            noise: standard normal, (B,c,h,w); unused by an autoencoder.

        Returns:
            The decoder's output before its activation, (B,C,H,W); mean and log-variance, each (B,c,h,w).

        References:
            Kingma & Welling 2014, arXiv:1312.6114, section 2.4.
        """
        mean, logvar = self.moments(x)
        z = mean if self.deterministic else mean + (0.5 * logvar).exp() * noise
        return self.logits(z), mean, logvar


class DeepVAE(Autoencoder):
    """A VAE with one stride-2 stage per entry of `channels`, each followed by `blocks_per_level` blocks.

    Pixels are (B, in_channels, H, W) in [-1, 1], image_size = H = W or [H, W]; latents (B, *latent_shape).
    `head` makes mean and log-variance of the features: `linear` by two fully connected layers (behind one of
    `hidden_dim`, if given), `conv` by a convolution, whose pixels are folded into channels where the latents
    have shorter sides than the features, `identity` not at all (deterministic only). The output
    activation acts in [0, 1]; decode maps it by 2y - 1. `latents_mean` and `latents_std`, one number for each
    channel or element, are there for others, as autoencoders of diffusers have them: the pipeline normalises
    by its codec, which has the same numbers, and nothing is scaled beyond that.
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
            encoder += [_down(downsample, before, after, activation), *blocks(after)]
        for before, after in zip(reversed(channels), [*reversed(channels[:-1]), channels[0]], strict=True):
            decoder += [*blocks(before), _up(upsample, before, after), ACTIVATIONS[activation]()]
        self.encoder = nn.Sequential(*encoder)  # (B,C,H,W) -> (B,f,h',w')
        last = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        self.decoder = nn.Sequential(*decoder, last)  # (B,f,h',w') -> (B,C,H,W)
        height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
        scale = 2 ** len(channels)
        features = (channels[-1], height // scale, width // scale)
        moments = 1 if posterior == "deterministic" else 2  # mean, log-variance
        self.to_moments, self.from_latent = _heads(
            head, features, latent_shape, moments, hidden_dim, activation
        )

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments = self.to_moments(self.encoder(x)).float()  # (B,2c,h,w), or (B,c,h,w) of an autoencoder
        if self.deterministic:
            return moments, torch.full_like(moments, LOGVAR_RANGE[0])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.from_latent(z))


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

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.network.encode(x, return_dict=False)[0]
        if self.deterministic:
            return found.float(), torch.full_like(found, LOGVAR_RANGE[0], dtype=torch.float32)
        return found.mean.float(), found.logvar.float()

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        return (self.network.decode(z, return_dict=False)[0] + 1) / 2


def _heads(
    head: str,
    features: tuple[int, int, int],
    latent: tuple[int, int, int],
    moments: int,
    hidden: int | None,
    activation: str,
) -> tuple[nn.Module, nn.Module]:
    """The maps features (B,f,h',w') -> moments (B,2c,h,w) or (B,c,h,w), and latents (B,c,h,w) -> features."""
    c, h, w = latent
    if head == "identity":
        return nn.Identity(), nn.Identity()
    if head == "conv":
        fold = features[1] // h
        mean_and_logvar = nn.Conv2d(features[0], moments * c // fold**2, 3, padding=1)
        into_features = nn.Conv2d(c // fold**2, features[0], 3, padding=1)
        if fold == 1:
            return mean_and_logvar, into_features
        # A mean and its log-variance stay as far apart as they were: the channels of one come first.
        folded = nn.Sequential(mean_and_logvar, nn.PixelUnshuffle(fold))
        return folded, nn.Sequential(nn.PixelShuffle(fold), into_features)
    flat = math.prod(features)
    dz = c * h * w
    into: list[nn.Module] = []
    back: list[nn.Module] = []
    if hidden:
        into = [nn.Linear(flat, hidden), ACTIVATIONS[activation]()]
        back = [nn.Linear(dz, hidden), ACTIVATIONS[activation]()]
    back.append(nn.Linear(hidden or dz, flat))
    # One matrix of 2 dz rows is the two fully connected heads, mean and log-variance, side by side.
    both = nn.Linear(hidden or flat, moments * dz)
    to_moments = nn.Sequential(nn.Flatten(), *into, both, nn.Unflatten(1, (moments * c, h, w)))
    return to_moments, nn.Sequential(nn.Flatten(), *back, nn.Unflatten(1, features))
