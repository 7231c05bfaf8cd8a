"""The parts of the VAE: residual blocks, halving and doubling, and the heads around the latents.

An exported pipeline carries a copy of this file beside model.py.
Dimension key: B batch, f h' w' features of the last stage, c h w latents, dz = c*h*w.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
}


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


def down(kind: str, in_channels: int, out_channels: int, activation: str) -> nn.Module:
    """Halve height and width: strided 3x3 convolution, that with a shortcut, or convolution and pooling."""
    if kind == "shortcut":
        return ShortcutDown(in_channels, out_channels)
    if kind == "stride":
        strided = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        return nn.Sequential(strided, ACTIVATIONS[activation]())
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(convolution, ACTIVATIONS[activation](), nn.MaxPool2d(2))


def up(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """Double height and width. The transposed kernel is 4 wide, a multiple of the stride: no checkerboard."""
    if kind == "shortcut":
        return ShortcutUp(in_channels, out_channels)
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1))
    nearest = nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Sequential(nearest, nn.Conv2d(in_channels, out_channels, 3, padding=1))


def heads(
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
    out = nn.Linear(hidden or dz, flat)
    # One matrix of 2 dz rows is the two fully connected heads, mean and log-variance, side by side.
    both = nn.Linear(hidden or flat, moments * dz)
    if not hidden and (h, w) == features[1:]:
        for layer in (both, out):
            _begin_local(layer, h * w)
    to_moments = nn.Sequential(nn.Flatten(), *into, both, nn.Unflatten(1, (moments * c, h, w)))
    return to_moments, nn.Sequential(nn.Flatten(), *back, out, nn.Unflatten(1, features))


@torch.no_grad()
def _begin_local(layer: nn.Linear, places: int) -> None:
    """Let a fully connected layer between (.,h,w) and (.,h,w) begin as a convolution of 1x1.

    Nothing keeps it there, but training hardly leaves it (d'Ascoli et al. 2019, arXiv:1906.06766): latents
    belong to places, which the decoder learns faster and a convolutional denoiser needs.
    """
    outputs, inputs = layer.out_features // places, layer.in_features // places
    weight = layer.weight.zero_().view(outputs, places, inputs, places)
    weight.diagonal(dim1=1, dim2=3).copy_(nn.Conv2d(inputs, outputs, 1).weight[..., 0])


# ---------------------------------------------------------------- larger than trained


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: tuple[int, int],
    made: tuple[int, int],
) -> torch.Tensor:
    """What a function makes of overlapping tiles, blended linearly where they overlap.

    Arguments:
        function: of a tile (B,.,*tile), which makes (B,.,*made) of it.
        x: (B,.,H,W), at least as large as a tile.
        tile: height and width of what goes in.
        made: of what comes out.

    Returns:
        (B, ., H made / tile, W made / tile).
    """
    starts = [_starts(length, side, out) for length, side, out in zip(x.shape[2:], tile, made, strict=True)]
    ramps = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)) for n in made]
    window = (ramps[0][:, None] * ramps[1]).to(x.device, torch.float32)
    total = weight = None
    for top in starts[0]:
        for left in starts[1]:
            part = function(x[:, :, top : top + tile[0], left : left + tile[1]])
            if total is None or weight is None:
                sides = [n * out // side for n, side, out in zip(x.shape[2:], tile, made, strict=True)]
                total = part.new_zeros(*part.shape[:2], *sides)
                weight = window.new_zeros(sides)
            row, column = top * made[0] // tile[0], left * made[1] // tile[1]
            place = (..., slice(row, row + made[0]), slice(column, column + made[1]))
            total[place] += window * part
            weight[place] += window
    assert total is not None and weight is not None
    return total / weight


def _starts(length: int, side: int, made: int) -> list[int]:
    """Where tiles begin that overlap by a quarter, so that what they make begins at whole places."""
    unit = max(1, side // made)
    if length < side or (length - side) % unit:
        raise ValueError(f"{length} pixels: tiles of {side} want at least as many, in steps of {unit}")
    stride = max(unit, 3 * side // 4 // unit * unit)
    return [*range(0, length - side, stride), length - side]
