"""Laws of restoration: operators by hand, agreement with the measurement, what is wrong in one line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.sampling import restoring
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler


@pytest.fixture
def pipe(trained):
    pipe = LatentDiffusionPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, seed):
    """An image that the model can draw, (1,C,H,W) in [-1, 1]."""
    return pipe(3, seed=seed).pixels


def test_operators_by_hand():
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(restoring.downsampled(4)(x)[:, :, 1, 2], x[:, :, 4:8, 8:12].mean((2, 3)))
    flat = torch.full((1, 1, 16, 16), 0.3)
    assert torch.allclose(restoring.blurred(2.0)(flat), flat)
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1
    spread = restoring.blurred(2.0)(point)[0, 0]
    places = torch.arange(31.0) - 15
    assert spread.sum() == pytest.approx(1) and (spread.sum(0) * places**2).sum() == pytest.approx(
        4, rel=0.05
    )
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :5] = True
    assert (
        torch.equal(restoring.seen(mask)(x)[..., :5], x[..., :5])
        and not restoring.seen(mask)(x)[..., 5:].any()
    )


class Linear:
    """A decoder that is the identity, so that the posterior of a measurement is known in closed form."""

    dtype = torch.float32
    config = SimpleNamespace(in_channels=1, image_size=8)

    def decode(self, z):
        return SimpleNamespace(sample=z)


class Knows:
    """The exact velocity for the Gaussian N(0, 1) in every latent."""

    def __call__(self, z, t):
        time = t / 1000
        return (2 * time - 1) / ((1 - time) ** 2 + time**2) * z


def test_what_is_restored_agrees_and_what_was_not_measured_keeps_its_spread():
    """White Gaussian pixels of which means of 2x2 are known: these agree, deviations from them have 3/4."""
    pipe = SimpleNamespace(
        vae=Linear(),
        scheduler=make_scheduler("flow", "euler"),
        config=SimpleNamespace(codec={"mean": [0.5], "std": [2.0]}),
    )
    x = 0.5 + 2 * torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    operator = restoring.downsampled(2)
    begin = restoring.Measured(operator(x), operator)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = 0.5 + 2 * restoring.restore(pipe, begin, noise, lambda t: Knows(), 50)
    assert (operator(found) - begin.y).square().mean() < 0.01 * (begin.y - 0.5).square().mean()
    apart = found - operator(found).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert apart.square().mean().item() == pytest.approx(4 * 0.75, rel=0.15)


def test_a_restoration_is_reproducible_and_has_variants(pipe):
    y = drawn(pipe, 11)
    operator = restoring.blurred(1.5)
    one, other = (pipe([3, 3], image=operator(y) / 2 + 0.5, operator=operator, seed=0) for _ in range(2))
    assert np.array_equal(one.values, other.values)
    assert not torch.equal(one.latents[0], one.latents[1])


def test_a_picture_is_taken_as_it_is_given(pipe):
    """A small picture and the array of its grey levels are one measurement."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
    operator = restoring.downsampled(4)
    one = pipe(1, image=Image.fromarray(small), operator=operator, seed=0)
    other = pipe(1, image=small[None], operator=operator, seed=0)
    assert np.array_equal(one.values, other.values)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (np.zeros((1, 5, 5), np.uint8), r"image: \(1, 5, 5\); the operator makes \(1, 4, 4\)"),
        (np.zeros((3, 1, 4, 4), np.uint8), "image: 3 of them for 2 images"),
    ],
)
def test_what_does_not_fit_is_one_line(pipe, image, line):
    with pytest.raises(ValueError, match=line):
        pipe([1, 2], image=image, operator=restoring.downsampled(4))


def test_an_operator_that_leaves_nothing_is_one_line(pipe):
    with pytest.raises(ValueError, match="operator: nothing is left of 16x16 px"):
        pipe(1, image=np.zeros((1, 1, 1), np.uint8), operator=restoring.downsampled(32))


def test_values_that_are_no_pixels_are_one_line(pipe):
    pipe.register_to_config(value_transform={"kind": "log1p", "low": 0.0, "high": 9.0})
    with pytest.raises(ValueError, match="operator: acts on pixels"):
        pipe(1, image=np.zeros((1, 4, 4), np.float32), operator=restoring.downsampled(4))
