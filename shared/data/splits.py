"""A source divided into training and held-out images; what is measured on a split."""

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from shared.config import InputError
from shared.data.config import DataConfig
from shared.data.sources import Source
from shared.sampling.transforms import ValueTransform


class Pixels(Dataset):
    """One split of a source: raw images and labels by position."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.num_workers = source, indices, source.data.num_workers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """Raw pixels (B,C,H,W), uint8 or float32, and class numbers (B,) where the source has them."""
        indices = self.indices[positions]
        images = self.source.read(indices.tolist())
        for row in [row for row, image in enumerate(images) if image is None]:
            indices[row], images[row] = self._next_readable(positions[row])
        batch = {"raw": torch.from_numpy(np.stack(images))}
        if self.source.labels is not None:
            batch["label"] = torch.from_numpy(self.source.labels[indices])
        return batch

    def _next_readable(self, position: int) -> tuple[int, np.ndarray]:
        """In the place of an image that cannot be read, the next of the same split that can, under its own label."""
        for offset in range(1, len(self)):
            index = int(self.indices[(position + offset) % len(self)])
            if (image := self.source.read([index])[0]) is not None:
                return index, image
        raise InputError(f"data.source: {self.source.data.source} has no readable image")


def split(source: Source, data: DataConfig) -> tuple[Pixels, Pixels]:
    """Train and validation parts, disjoint, the same in every run whatever its seed; patches of an image stay together."""
    group = source.per_group
    order = np.random.default_rng(0).permutation(len(source) // group)[: data.limit]
    held_out = min(max(1, round(len(order) * data.val_fraction)), len(order) - 1)
    parts = (np.sort(order[held_out:]), np.sort(order[:held_out]))
    train, val = ((part[:, None] * group + np.arange(group)).ravel() for part in parts)
    return Pixels(source, train), Pixels(source, val)


def evenly(length: int, count: int) -> list[int]:
    """At most `count` positions, evenly spaced over a split: sources are often sorted by class."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def whole(source: Source) -> Pixels:
    """All images of a source in their order."""
    return Pixels(source, np.arange(len(source)))


def identity(pixels: Pixels, data: DataConfig) -> dict:
    """What makes these data these data: how they are read, how many, and a hash of 64 of them."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels.indices).tobytes())
    if pixels.source.labels is not None:
        digest.update(np.ascontiguousarray(pixels.source.labels[pixels.indices]).tobytes())
    for position in np.linspace(0, len(pixels) - 1, 64).astype(int):
        digest.update(pixels.source.content(int(pixels.indices[position])))
    return {
        "image_size": data.image_size, "channels": data.channels, "resize": data.resize,
        "images": len(pixels), "content": digest.hexdigest()[:32],
    }  # fmt: skip


def fit_transform(pixels: Pixels, data: DataConfig) -> ValueTransform:
    """The value transform of a recipe; bounds that it leaves open are measured on this split (the training split)."""
    wanted = data.value_transform
    if wanted.kind == "auto":
        wanted = replace(wanted, kind="range", low=0.0, high=255.0) if pixels.source.integer else replace(wanted, kind="minmax")
    low, high = wanted.low, wanted.high
    if low is None or high is None:
        seen_low, seen_high = _bounds(pixels)
        low, high = seen_low if low is None else low, seen_high if high is None else high
    if wanted.kind in ("log1p", "sqrt") and low < 0:
        raise InputError(f"data.value_transform.kind: {wanted.kind} is for values >= 0, the data go down to {low:g}")
    if not low < high:
        raise InputError(f"data.value_transform: all values are {low:g}; nothing to learn from")
    return ValueTransform(wanted.kind, low, high, wanted.scale, pixels.source.integer)


def _bounds(pixels: Pixels) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for start in range(0, len(pixels), 256):
        raw = pixels.__getitems__(list(range(start, min(start + 256, len(pixels)))))["raw"]
        if not raw.isfinite().all():
            name = pixels.source.data.source
            raise InputError(f"data.source: {name} holds NaN or infinite values (images {start} to {start + len(raw) - 1} of its split)")
        low, high = min(low, raw.min().item()), max(high, raw.max().item())
    return float(low), float(high)
