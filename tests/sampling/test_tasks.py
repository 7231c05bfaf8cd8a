"""The way between two noises: its ends are theirs, and on it noise keeps its length."""

import torch

from shared.sampling.tasks import great_circle


def test_the_great_circle_joins_two_noises_at_their_length():
    a, b = torch.randn(2, 4, 8, 8)
    b = b * a.norm() / b.norm()
    way = great_circle(a, b, 9)
    torch.testing.assert_close(way[0], a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(way[-1], b, atol=1e-5, rtol=1e-4)
    lengths = way.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, a.norm().expand(9), rtol=1e-4, atol=1e-3)
    steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[0].expand(8), rtol=1e-3, atol=1e-3)
