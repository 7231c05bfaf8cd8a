"""What can be asked of a pipeline beside fresh samples. Does not depend on networks."""

import torch


def great_circle(a: torch.Tensor, b: torch.Tensor, count: int) -> torch.Tensor:
    """The way between two noises on which noise keeps its length (spherical interpolation, Shoemake 1985).

    With the angle w between a and b: (sin((1 - s) w) a + sin(s w) b) / sin w, s from 0 to 1.

    Arguments:
        a, b: standard normal, (c,h,w).
        count: the number of points N, both ends among them.

    Returns:
        (N,c,h,w).
    """
    angle = torch.arccos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1)).clamp_min(1e-4)
    weights = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)
