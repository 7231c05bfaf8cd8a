"""Averaged weights: the copy of a model that is validated, shown, saved for others and sampled from."""

import copy
import math

import torch


class Ema:
    """theta_ema <- d theta_ema + (1 - d) theta, d = min(decay, (1 + step) / (10 + step)); buffers are copied.

    `module` is a full model of the same class, in eval mode and without gradients. until: it stands still from that step on.
    """

    def __init__(self, model: torch.nn.Module, decay: float, until: float = math.inf):
        self.decay, self.until = decay, until
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step >= self.until:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
