"""Random numbers that are a function of their key, (seed, step, name), and of nothing that happened before.

A draw is made for the whole global batch and each process takes its rows, so neither the number of processes
nor a resume, a preview or a validation in between changes a single number of a training.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from any key of numbers and words."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on a device, seeded by a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Rows:
    """Rows start:stop of a global batch of `total`, on a device: the share of one process in one draw."""

    seed: int
    step: int
    start: int
    stop: int
    total: int
    device: torch.device

    def _draw(self, sample: Callable[..., torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
        key = generator(self.seed, self.step, name, device=self.device)
        return sample((self.total, *shape), generator=key, device=self.device)[self.start : self.stop]

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """Standard normal numbers, (rows, *shape)."""
        return self._draw(torch.randn, name, shape)

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), (rows, *shape)."""
        return self._draw(torch.rand, name, shape)
