"""What the latents are doing: how many of them say anything at all."""

import torch

ACTIVE = 0.01  # nats of variance below which a latent counts as asleep (Burda et al. 2016, arXiv:1509.00519, section 5)


def active_units(means: torch.Tensor) -> int:
    """The number of latent dimensions whose posterior mean varies over the data: Var_x(E[z|x]) > 0.01.

    means: posterior means (N,c,h,w) of N images.
    """
    return int((means.flatten(1).float().var(dim=0) > ACTIVE).sum())
