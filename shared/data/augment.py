"""Symmetries of training images: flips, quarter turns and small shifts.

Each image's share is a function of numbers drawn for its row, so neither a resume nor the number of processes
changes it. Held-out images are never changed. Dimension key: B batch, N images, C channels, H W pixels.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from shared.data.config import AugmentConfig
from shared.data.splits import Pixels

# flip -> its symmetries: transposed, flipped upside down, flipped left to right; the first changes nothing
SYMMETRIES = {
    "none": [(0, 0, 0)],
    "horizontal": [(0, 0, 0), (0, 0, 1)],
    "vertical": [(0, 0, 0), (0, 1, 0)],
    "both": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)],
    "dihedral": [(t, v, h) for t in (0, 1) for v in (0, 1) for h in (0, 1)],
}


@functools.cache
def symmetries(flip: str, device: torch.device) -> torch.Tensor:
    """The symmetries of a flip, (S,3); copied to the device once, not at every step."""
    return torch.tensor(SYMMETRIES[flip], dtype=torch.bool, device=device)


def augment(x: torch.Tensor, config: AugmentConfig, uniform: torch.Tensor) -> torch.Tensor:
    """Each image under a symmetry of its own, and shifted by up to config.shift pixels either way.

    Arguments:
        x: images of any dtype, (B,C,H,W); H = W for dihedral.
        config: which symmetries, and how far.
        uniform: numbers in [0, 1), (B,3): the symmetry, the shift down and the shift to the right.
    """
    table = symmetries(config.flip, x.device)
    moved = transformed(x, table[(uniform[:, 0] * len(table)).long()])
    if not config.shift:
        return moved
    return shifted(moved, (uniform[:, 1:] * (2 * config.shift + 1)).long() - config.shift)


def transformed(x: torch.Tensor, symmetry: torch.Tensor) -> torch.Tensor:
    """Images (B,C,H,W) under symmetries (B,3): transposed, then flipped upside down, then left to right."""
    transposed, down, right = (column.view(-1, 1, 1, 1) for column in symmetry.unbind(1))
    if x.shape[-2] == x.shape[-1]:
        x = torch.where(transposed, x.transpose(-2, -1), x)
    x = torch.where(down, x.flip(-2), x)
    return torch.where(right, x.flip(-1), x)


def shifted(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Images (B,C,H,W) moved down and right by offsets (B,2) in pixels; what enters repeats the edge."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device) - offsets[:, :1]).clamp(0, height - 1)  # (B,H)
    columns = (torch.arange(width, device=x.device) - offsets[:, 1:]).clamp(0, width - 1)  # (B,W)
    batch = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return x[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Copies(Dataset):
    """Training images as the cache of stage 2 holds them: as they are, then `copies - 1` times augmented.

    Position p is image p % N. Copy k has the k-th symmetry, in turn, so that two copies with horizontal flips
    are an image and its mirror image; shifts are drawn by (image, copy).
    """

    def __init__(self, images: Pixels, config: AugmentConfig):
        self.images = images
        self.config = config
        self.num_workers = images.num_workers

    def __len__(self) -> int:
        return len(self.images) * self.config.copies

    @property
    def called(self) -> np.ndarray:
        """What each position is called in a message: its image."""
        return np.tile(self.images.called, self.config.copies)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Raw pixels (B,C,H,W) and class numbers (B,) where the source has them."""
        copies, images = np.divmod(np.asarray(positions), len(self.images))
        batch = self.images.__getitems__(images.tolist())
        table = symmetries(self.config.flip, batch["raw"].device)
        moved = transformed(batch["raw"], table[torch.from_numpy(copies) % len(table)])
        if self.config.shift:
            offsets = torch.tensor([self._offset(*pair) for pair in zip(images, copies, strict=True)])
            moved = shifted(moved, offsets)
        return batch | {"raw": moved}

    def _offset(self, image: int, copy: int) -> list[int]:
        """How far a copy is shifted down and to the right; the first not at all."""
        if not copy:
            return [0, 0]
        most = self.config.shift
        return np.random.default_rng([int(image), int(copy)]).integers(-most, most + 1, 2).tolist()
