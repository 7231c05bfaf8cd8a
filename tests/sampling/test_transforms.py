"""Both transforms are invertible, and exact where they can be."""

import pytest
import torch

from shared.sampling.transforms import LatentCodec, ValueTransform


@pytest.mark.parametrize(("kind", "scale"), [("range", 1.0), ("sqrt", 1.0), ("log1p", 1.0), ("log1p", 0.1)])
def test_inverse(kind, scale):
    raw = torch.rand(2, 3, 8, 8) * 500
    transform = ValueTransform(kind, 0.0, 500.0, scale)
    x = transform(raw)
    assert x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(transform.inverse(x), raw, rtol=1e-3, atol=1e-2)
    assert transform(torch.tensor([0.0, 500.0])).tolist() == pytest.approx([-1, 1])


def test_asinh_keeps_both_signs_and_resolves_what_is_small_beside_what_is_large():
    raw = torch.tensor([-500.0, -1.0, 0.0, 1.0, 2.0, 5e4])
    transform = ValueTransform("asinh", -500.0, 5e4, 2.0)
    x = transform(raw)
    assert x[0].item() == pytest.approx(-1) and x[-1].item() == pytest.approx(1)
    assert (x[3] - x[2]) > 0.05 > 1000 * 2 / 50500  # of the linear map: 4e-5
    torch.testing.assert_close(transform.inverse(x), raw, rtol=1e-3, atol=1e-3)


def test_grey_levels_are_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    transform = ValueTransform("range", 0, 255, integer=True)
    assert torch.equal(transform.inverse(transform(levels)), levels)


def test_what_leaves_the_range_is_clipped():
    assert ValueTransform("range", 10, 20).inverse(torch.tensor([-3.0, 3.0])).tolist() == [10, 20]


def test_saved_and_loaded(tmp_path):
    transform = ValueTransform("log1p", 0.0, 545.25, 0.1)
    transform.save_pretrained(tmp_path / "t")
    assert ValueTransform.from_pretrained(tmp_path / "t").config == transform.config
    codec = LatentCodec(torch.rand(4, 1, 1).tolist(), torch.rand(4, 1, 1).tolist())
    codec.save_pretrained(tmp_path / "c")
    assert torch.equal(LatentCodec.from_pretrained(tmp_path / "c").std, codec.std)


def test_codec_normalises_and_inverts():
    mean, std = torch.randn(4, 1, 1) * 3, torch.rand(4, 1, 1) + 0.5
    codec = LatentCodec(mean.tolist(), std.tolist())
    centre, logvar, noise = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
    z = codec.sample(torch.cat([centre, logvar], 1), noise)
    torch.testing.assert_close(codec.decode(z), centre + (0.5 * logvar).exp() * noise)


def test_each_channel_may_have_a_map_of_its_own(tmp_path):
    kinds, lows, highs = ["minmax", "log1p", "sqrt"], [200.0, 0.0, 0.0], [320.0, 1e6, 4.0]
    transform = ValueTransform(kinds, lows, highs, [1.0, 10.0, 1.0])
    raw = torch.stack(
        [200 + 120 * torch.rand(2, 8, 8), 1e6 * torch.rand(2, 8, 8) ** 4, 4 * torch.rand(2, 8, 8)], 1
    )
    x = transform(raw)
    for channel, (kind, low, high, scale) in enumerate(
        zip(kinds, lows, highs, (1.0, 10.0, 1.0), strict=True)
    ):
        alone = ValueTransform(kind, low, high, scale)
        assert torch.equal(x[:, channel : channel + 1], alone(raw[:, channel : channel + 1]))
    torch.testing.assert_close(transform.inverse(x), raw, rtol=1e-3, atol=1e-2)
    transform.save_pretrained(tmp_path)
    assert torch.equal(ValueTransform.from_pretrained(tmp_path)(raw), x)


def test_one_bound_for_all_and_a_list_of_the_others():
    transform = ValueTransform("sqrt", 0.0, [1.0, 4.0])
    assert transform(torch.tensor([1.0, 4.0]).view(1, 2, 1, 1)).flatten().tolist() == [1, 1]
