"""The two invertible maps: raw values <-> pixels x in [-1, 1], and raw latents <-> what the denoiser sees.

Also how a picture becomes raw values, in training as in an edit. An exported pipeline carries a copy of this
file. Does not depend on how images or latents are stored.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
DEEP = 257  # a grey level of 8 bits in those of 16
NEARBY = (64, 16, 4)  # pixels


def picture_parts(image: Image.Image, channels: int) -> list[Image.Image]:
    """A picture, upright, as what is resized each by itself: a grey or RGB image, or planes and their alpha.

    Grey levels 0..255, floats of a 16-bit file. Transparency is laid on white where there is no channel for
    it; else colours are taken times alpha: resized, what nobody sees is mixed with nothing. That these are
    such is told by alpha, which is of floats then; where all is seen it is of bytes.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_parts(image, channels)
    if "transparency" in image.info or image.mode in ("LA", "PA", "La"):
        image = image.convert("RGBA")
    if image.mode == "RGBA" and channels in (1, 3):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    if channels in (1, 3):
        return [image]
    *colours, alpha = image.split()
    if alpha.getextrema() == (255, 255):
        return [*colours, alpha]
    share = np.asarray(alpha, dtype=np.float32) / 255
    return [*(Image.fromarray(np.asarray(colour) * share) for colour in colours), alpha.convert("F")]


def _deep_parts(image: Image.Image, channels: int) -> list[Image.Image]:
    """The planes of a 16-bit grey image as floats on the 8-bit scale (65535 becomes 255); alpha is opaque.

    Raises ValueError for NaN and infinite ones.
    """
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    grey = Image.fromarray(values / np.float32(1 if image.mode == "F" else DEEP))
    alpha = [Image.new("L", image.size, 255)] if channels in (2, 4) else []
    return [grey] * (channels - len(alpha)) + alpha


def picture_planes(parts: list[Image.Image]) -> np.ndarray:
    """The parts of a picture as an array (C,H,W), uint8 or float32.

    What is transparent has the colours nearby. Files have any colour there, by how they were made, and its
    edges would have to be learned, too.
    """
    if parts[0].mode == "RGB":
        return np.ascontiguousarray(np.asarray(parts[0]).transpose(2, 0, 1))
    planes = np.stack([np.asarray(part) for part in parts])
    if len(parts) not in (2, 4) or parts[-1].mode == "L":  # all of it is seen
        return planes
    alpha = planes[-1]
    colours = planes[:-1] * (255 / np.maximum(alpha, 0.5))
    hidden = alpha < 0.5
    if hidden.any():
        colours = np.where(hidden, _colours_nearby(parts), colours)
    return np.concatenate([colours, alpha[None]]).round().clip(0, 255).astype(np.uint8)


def _colours_nearby(parts: list[Image.Image]) -> np.ndarray:
    """Colours (C,H,W) for what is transparent: means of what is seen around, from wide to narrow.

    Pull-push, as in Gortler et al. 1996, The Lumigraph, section 3.5.
    """
    *colours, alpha = [np.asarray(part, dtype=np.float32).mean() for part in parts]
    found = np.reshape(colours, (-1, 1, 1)) * (255 / max(alpha, 1e-3))
    for factor in NEARBY:
        small = [part.reduce(factor) for part in parts]
        wide = [np.asarray(part.resize(parts[0].size, Image.Resampling.BILINEAR)) for part in small]
        alpha = np.maximum(wide[-1], 1e-3)
        share = np.minimum(alpha / 64, 1)  # of a place a quarter of which is seen all is known
        found = share * np.stack(wide[:-1]) * (255 / alpha) + (1 - share) * found
    return found


class _Saved:
    """Constants that stand as JSON in `<folder>/config.json`."""

    config: dict[str, Any]

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        return cls(**json.loads((Path(folder) / "config.json").read_text()))


class _ValueMap:
    """x = 2 (f(raw) - f(low)) / (f(high) - f(low)) - 1.

    f is the identity, log1p(raw / scale), asinh(raw / scale) or sqrt(raw).
    """

    def __init__(self, kind: str, low: float, high: float, scale: float):
        self.kind = kind
        self.scale = scale
        self.low = self._f(torch.tensor(low, dtype=torch.float64)).item()
        self.high = self._f(torch.tensor(high, dtype=torch.float64)).item()

    def _f(self, raw: torch.Tensor) -> torch.Tensor:
        if self.kind == "log1p":
            return torch.log1p(raw.clamp_min(0) / self.scale)  # resizing may undershoot 0 a little
        if self.kind == "asinh":
            return torch.asinh(raw / self.scale)
        return raw.clamp_min(0).sqrt() if self.kind == "sqrt" else raw

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        return (self._f(raw.float()) - self.low) * (2 / (self.high - self.low)) - 1

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        y = (x.float().clamp(-1, 1) + 1) * ((self.high - self.low) / 2) + self.low
        if self.kind == "log1p":
            return torch.expm1(y) * self.scale
        if self.kind == "asinh":
            return torch.sinh(y) * self.scale
        return y.square() if self.kind == "sqrt" else y


class ValueTransform(_Saved):
    """Raw values to pixels in [-1, 1] and back: one map for all channels, or a list with one for each.

    Arguments:
        kind: range or minmax (linear), log1p, asinh or sqrt; or a list of C of them.
        low, high: raw values, which become -1 and 1; or lists of C of them.
        scale: raw values below it stay nearly linear under log1p and asinh; or a list.
        integer: raw values are grey levels 0..255, to be rounded on the way back.
    """

    def __init__(
        self,
        kind: str | list[str],
        low: float | list[float],
        high: float | list[float],
        scale: float | list[float] = 1.0,
        integer: bool = False,
    ):
        self.config = {"kind": kind, "low": low, "high": high, "scale": scale, "integer": integer}
        self.integer = integer
        parts: list[Any] = [kind, low, high, scale]
        channels = max(len(part) if isinstance(part, list) else 1 for part in parts)
        columns = [part if isinstance(part, list) else [part] * channels for part in parts]
        self.maps = [_ValueMap(*row) for row in zip(*columns, strict=True)]

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw values (B,C,H,W) of any dtype to pixels, float32, [-1, 1] for values between low and high."""
        if len(self.maps) == 1:
            return self.maps[0](raw)
        return torch.stack([one(raw[:, c]) for c, one in enumerate(self.maps)], dim=1)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels (B,C,H,W), clipped to [-1, 1], to raw values; uint8 where these are grey levels."""
        if len(self.maps) == 1:
            y = self.maps[0].inverse(x)
        else:
            y = torch.stack([one.inverse(x[:, c]) for c, one in enumerate(self.maps)], dim=1)
        return y.round().clamp(0, 255).to(torch.uint8) if self.integer else y


class LatentCodec(_Saved):
    """Latents to zero mean and unit deviation and back: (z - mean) / std.

    Arguments:
        mean, std: of the raw latents, as nested lists of the shape (c,1,1), one number per channel, or
            (c,h,w),
            one per element.
    """

    def __init__(self, mean: list, std: list):
        self.config = {"mean": mean, "std": std}
        self.mean = torch.tensor(mean)
        self.std = torch.tensor(std)

    def to(self, device: torch.device | str) -> "LatentCodec":
        self.mean = self.mean.to(device)
        self.std = self.std.to(device)
        return self

    def sample(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A normalised latent of a stored posterior N(mean_x, sigma_x^2).

        It is (mean_x + sigma_x noise - mean) / std.

        Arguments:
            moments: [mean_x, log sigma_x^2], (B,2c,h,w).
            noise: standard normal, (B,c,h,w).

        Returns:
            What the denoiser sees, (B,c,h,w).
        """
        mean, logvar = moments.float().chunk(2, dim=1)
        return (mean + (0.5 * logvar).exp() * noise - self.mean) / self.std

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """What the denoiser made, (B,c,h,w), back to what the VAE's decoder takes."""
        return z * self.std + self.mean
