"""Images and latents as tensors to measure, a batch at a time and within a GiB.

Dimension key: N images, C H W pixels, c h w latents.
"""

from typing import Any

import torch

from shared.data import splits
from shared.data.config import DataConfig
from shared.sampling.transforms import ValueTransform
from stage1_vae.model import MOST_PIXELS

BATCH = 64  # images that a network is shown at once
MOST_VALUES = 2**28  # of pixels in memory: a GiB


class Rows:
    """The rows (N,...) of a tensor that come batch by batch, in the CPU's memory, reserved at once.

    Small tensors that are kept one by one, between large ones that go, leave holes that nothing large fits
    into: some GiB of them after 10,000 images of 256 px.
    """

    def __init__(self, count: int):
        self.count = count
        self.filled = 0
        self.kept: torch.Tensor | None = None

    def add(self, batch: torch.Tensor) -> None:
        if self.kept is None:
            self.kept = torch.empty(self.count, *batch.shape[1:], dtype=batch.dtype)
        self.kept[self.filled : self.filled + len(batch)] = batch
        self.filled += len(batch)

    def all(self) -> torch.Tensor:
        assert self.kept is not None
        # A part of a tensor would be sent to other processes with all of its memory.
        return self.kept if self.filled == self.count else self.kept[: self.filled].clone()


@torch.inference_mode()
def encode(vae: Any, x: torch.Tensor, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, each (N,c,h,w), of pixels (N,C,H,W), a batch at a time."""
    parts = [vae.encode(part.to(device)).latent_dist.parameters.float().cpu() for part in x.split(BATCH)]
    mean, logvar = torch.cat(parts).chunk(2, dim=1)
    return mean, logvar


@torch.inference_mode()
def decode(vae: Any, z: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Pixels (N,C,H,W) of latents (N,c,h,w), a batch at a time."""
    return torch.cat([vae.decode(part.to(device)).sample.float().cpu() for part in z.split(BATCH)])


def pixels(
    part: splits.Pixels, transform: ValueTransform, count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to `count` images of a split, evenly taken, as pixels (N,C,H,W) in [-1, 1], and their labels (N,).

    Fewer where they would need more than a GiB.
    """
    data = part.source.data
    most = max(BATCH, MOST_VALUES // (data.channels * data.height * data.width))
    rows = splits.evenly(len(part), min(count, most))
    x = Rows(len(rows))
    labels = []
    for batch in splits.read(part, rows, BATCH):
        x.add(transform(batch["raw"]))
        if "label" in batch:
            labels.append(batch["label"])
    return x.all(), torch.cat(labels) if labels else None


def batch_size(data: DataConfig) -> int:
    """Images that are decoded at once: BATCH, fewer from 128 px on."""
    return max(4, min(BATCH, MOST_PIXELS // (data.height * data.width)))


def are_photographs(part: splits.Pixels) -> bool:
    """Whether the Inception has something to say: 8-bit images that are not scikit-learn's digits."""
    return part.source.integer and part.source.data.source != "digits"
