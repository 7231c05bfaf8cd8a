"""A draw is a function of its key; processes take rows of the same draw."""

import torch

from shared.training.keyed import Rows, seed_of


def rows(start, stop, step=3, seed=0):
    return Rows(seed, step, start, stop, 12, torch.device("cpu"))


def test_processes_take_rows_of_one_draw():
    for draw in ("normal", "uniform"):
        whole = getattr(rows(0, 12), draw)("noise", 2, 3)
        parts = [getattr(rows(i, i + 4), draw)("noise", 2, 3) for i in (0, 4, 8)]
        assert torch.equal(torch.cat(parts), whole)


def test_every_part_of_the_key_matters():
    first = rows(0, 12).normal("noise")
    others = [
        rows(0, 12).normal("posterior"),
        rows(0, 12, step=4).normal("noise"),
        rows(0, 12, seed=1).normal("noise"),
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_nothing_that_happened_before_matters():
    first = rows(0, 12).normal("noise")
    torch.manual_seed(7)
    torch.randn(100)
    assert torch.equal(rows(0, 12).normal("noise"), first)
    assert seed_of(0, "a") == seed_of(0, "a") != seed_of(0, "b")
