"""The two invertible maps: raw values <-> pixels x in [-1, 1], and raw latents <-> what the denoiser sees.

torch and numpy only: an exported pipeline carries a copy of this file. Refuses to know files of images or latents.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

import json
from pathlib import Path

import torch


class _Saved:
    """Constants that stand as JSON in `<folder>/config.json`."""

    def save_pretrained(self, folder) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder):
        return cls(**json.loads((Path(folder) / "config.json").read_text()))


class ValueTransform(_Saved):
    """x = 2 (f(raw) - low) / (high - low) - 1, with f the identity, log1p(raw / scale) or sqrt(raw).

    `low` and `high` are raw values; `integer` says that raw values are grey levels 0..255 to be rounded.
    """

    def __init__(self, kind: str, low: float, high: float, scale: float = 1.0, integer: bool = False):
        self.config = {"kind": kind, "low": low, "high": high, "scale": scale, "integer": integer}
        self.kind, self.scale, self.integer = kind, scale, integer
        self.low, self.high = (self._f(torch.tensor(v, dtype=torch.float64)).item() for v in (low, high))

    def _f(self, raw):
        if self.kind == "log1p":
            return torch.log1p(raw.clamp_min(0) / self.scale)  # resizing may undershoot 0 a little
        return raw.clamp_min(0).sqrt() if self.kind == "sqrt" else raw

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw values (any dtype) to pixels, float32, [-1, 1] for values between low and high."""
        return (self._f(raw.float()) - self.low) * (2 / (self.high - self.low)) - 1

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels to raw values in the user's units; x is clipped to [-1, 1]. uint8 where raw values are grey levels."""
        y = (x.float().clamp(-1, 1) + 1) * ((self.high - self.low) / 2) + self.low
        if self.kind == "log1p":
            y = torch.expm1(y) * self.scale
        elif self.kind == "sqrt":
            y = y.square()
        return y.round().clamp(0, 255).to(torch.uint8) if self.integer else y


class LatentCodec(_Saved):
    """Latents to zero mean and unit deviation and back: (z - mean) / std.

    `mean` and `std` have the shape (c,1,1), one number per channel, or (c,h,w), one per element (nested lists).
    """

    def __init__(self, mean: list, std: list):
        self.config = {"mean": mean, "std": std}
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def to(self, device):
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def sample(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A normalised latent from stored moments [mean, logvar] (B,2c,h,w) and noise (B,c,h,w)."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return (mean + (0.5 * logvar).exp() * noise - self.mean) / self.std  # (B,c,h,w)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """What the denoiser made, back to what the VAE's decoder takes."""
        return z * self.std + self.mean
