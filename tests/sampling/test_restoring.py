"""Laws of restoration: operators by hand, agreement with the measurement, what is wrong in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from shared.sampling import restoring
from shared.sampling.pipeline import LatentDiffusionPipeline


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


@pytest.mark.parametrize(
    "operator", [restoring.downsampled(4), restoring.blurred(1.5)], ids=["small", "blurred"]
)
def test_what_is_restored_agrees_with_the_measurement(pipe, operator):
    """Better by far than a sample of the same class does, and nearer to the image itself."""
    x = drawn(pipe, 11)
    y = operator(x)
    out = pipe([3, 3], image=y / 2 + 0.5, operator=operator, seed=0)
    fresh = pipe([3, 3], seed=0).pixels
    assert (operator(out.pixels) - y).square().mean() < 0.1 * (operator(fresh) - y).square().mean()
    assert (out.pixels - x).square().mean() < 0.5 * (fresh - x).square().mean()
    again = pipe([3, 3], image=y / 2 + 0.5, operator=operator, seed=0)
    assert np.array_equal(again.values, out.values) and not np.array_equal(out.values[0], out.values[1])


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


def test_values_that_are_no_pixels_are_one_line(pipe):
    pipe.register_to_config(value_transform={"kind": "log1p", "low": 0.0, "high": 9.0})
    with pytest.raises(ValueError, match="operator: acts on pixels"):
        pipe(1, image=np.zeros((1, 4, 4), np.float32), operator=restoring.downsampled(4))
