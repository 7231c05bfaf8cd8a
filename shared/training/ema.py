"""Averaged weights: the copy of a model that is validated, shown, saved for others and sampled from."""

import copy
import math
from typing import Any

import torch


class Ema:
    """theta_ema <- d theta_ema + (1 - d) theta, d = min(decay, (1 + step) / (10 + step)); buffers are copied.

    `module` is a full model of the same class, in eval mode and without gradients.

    Arguments:
        model: the model in training, before it is wrapped or compiled.
        decay: the highest d, in [0, 1).
        until: the step from which on the average stands still.
    """

    def __init__(self, model: torch.nn.Module, decay: float, until: float = math.inf):
        self.decay = decay
        self.until = until
        self.module: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged: list[torch.Tensor] = list(self.module.parameters())
        self._current: list[torch.Tensor] = list(model.parameters())
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def restart(self) -> None:
        """Take the model's weights as they are, after it was filled with others."""
        for mine, theirs in zip(self._averaged, self._current, strict=True):
            mine.copy_(theirs)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step >= self.until:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
