"""Statistics of speckle and jets against closed forms."""

import numpy as np
import pytest

from shared.data import simulate
from shared.measure import fields


def test_white_noise_has_a_flat_spectrum_of_one():
    noise = np.random.default_rng(0).standard_normal((400, 32, 32))
    spectrum = fields.power_spectrum(noise)
    assert spectrum.shape == (400, 17)
    np.testing.assert_allclose(spectrum.mean(0)[1:], 1, atol=0.1)


def test_exponential_intensities_have_contrast_one():
    scalars, _ = fields.speckle(np.random.default_rng(0).exponential(5.0, (40, 1, 64, 64)))
    assert scalars["contrast"].mean() == pytest.approx(1, abs=0.01)
    assert scalars["intensity I/<I>"].mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("grain", [4, 6, 9])
def test_grain_width_is_that_of_a_circular_pupil(grain):
    """The intensity's autocovariance is |2 J1(x) / x|^2 with x = pi D r / N: half its height at 1.029 N / D
    (Goodman, 4.5)."""
    rng = np.random.default_rng(grain)
    frequency = np.fft.fftfreq(128)
    pupil = np.hypot(*np.meshgrid(frequency, frequency)) <= 0.5 / grain
    field = np.fft.ifft2(pupil * np.fft.fft2(np.exp(2j * np.pi * rng.random((30, 128, 128)))))
    assert fields.grain_width(np.abs(field) ** 2).mean() == pytest.approx(1.029 * grain, rel=0.08)


def test_a_jet_by_hand():
    x = np.zeros((1, 3, 64, 64))
    x[0, 0, 32, 32], x[0, 0, 32, 63], x[0, 1, 0, 0], x[0, 2, 32, 32] = 100, 2, 0.5, 300
    scalars, curves = fields.jets(x)
    assert scalars["multiplicity"] == [2] and scalars["energy (GeV)"] == [402.5]
    assert scalars["occupancy"] == pytest.approx(3 / x.size)
    assert scalars["girth"] == pytest.approx((400 * 0.0088 + 2 * 0.394 + 0.5 * 0.557) / 402.5, rel=0.01)
    assert curves["radial profile"][0, 0] == pytest.approx(400 / 402.5)


def test_equal_sets_are_at_distance_zero_and_shifted_ones_at_their_shift():
    real = np.stack([simulate.jet(i, 32) for i in range(40)])
    same = fields.compare("jets", real, real, ())
    assert all(row.get("wasserstein", 0) < 1e-9 and row.get("difference", 0) < 1e-9 for row in same.values())
    more = real.copy()
    more[:, 0, 0, :3] += 2.0  # three more tracks in every jet
    far = fields.compare("jets", more, real, ())
    assert far["multiplicity"]["wasserstein"] == pytest.approx(3) and far["energy (GeV)"][
        "wasserstein"
    ] == pytest.approx(6, rel=1e-3)
    assert same["multiplicity"]["floor"] > 0


def test_speckle_against_the_exponential_law():
    real = np.stack([simulate.speckle(i, 64) for i in range(40)])
    blurred = (real + np.roll(real, 9, 2) + np.roll(real, 9, 3)) / 3
    found, far = fields.compare("speckle", real, real, ()), fields.compare("speckle", blurred, real, ())
    assert found["intensity I/<I>"]["ks_to_exponential"] < 0.03 < far["intensity I/<I>"]["ks_to_exponential"]
    assert far["contrast"]["wasserstein"] > 0.3 > found["contrast"]["wasserstein"]


def test_the_floor_does_not_depend_on_the_order_of_the_images():
    real = np.stack(
        [simulate.jet(i, 32) for i in [*range(0, 80, 2), *range(1, 80, 2)]]
    )  # all gluons, then all quarks
    mixed = real[np.random.default_rng(5).permutation(80)]
    ordered, shuffled = (
        fields.compare("jets", real, images, ())["multiplicity"]["floor"] for images in (real, mixed)
    )
    halves = abs(
        fields.jets(real[:40])[0]["multiplicity"].mean() - fields.jets(real[40:])[0]["multiplicity"].mean()
    )
    assert ordered < 0.6 * halves and shuffled < 0.6 * halves


def test_an_image_of_one_value_has_no_grain():
    assert fields.grain_width(np.ones((2, 16, 16))).tolist() == [0, 0]


def waves(count, height, width, y, x, amplitude=1.0):
    """Plane waves with y and x periods over the image, each of its own phase, (count,1,height,width)."""
    phase = np.random.default_rng(0).random((count, 1, 1)) * 2 * np.pi
    rows, columns = np.mgrid[0:height, 0:width]
    return amplitude * np.sin(2 * np.pi * (y * rows / height + x * columns / width) + phase)[:, None]


def test_a_wave_lies_in_its_ring_and_in_its_sector():
    _, curves = fields.generic(waves(5, 40, 80, 0, 10), ["u"])
    radial, directional = curves["u: radial spectrum"].mean(0), curves["u: directional spectrum"].mean(0)
    assert radial.argmax() == 5 and len(radial) == 21  # 10 periods over 80 px are 5 over 40
    assert directional.argmax() == 0 and directional[0] > 100 * directional[1:].max()
    _, curves = fields.generic(waves(5, 64, 64, 6, 6), ["u"])
    assert curves["u: directional spectrum"].mean(0).argmax() == 2  # 45 degrees, in steps of 22.5


def test_the_power_of_a_spectrum_is_the_variance():
    """Parseval: the mean power over all frequencies is the variance of the pixels."""
    x = np.random.default_rng(1).normal(3, 2, (4, 24, 40))
    np.testing.assert_allclose(fields.power(x).mean((1, 2)), x.var((1, 2)))


def test_generic_statistics_by_hand():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(30, 1, 16, 16))
    values = np.concatenate([a, -2 * a + 1, rng.normal(size=a.shape), np.full_like(a, 3)], axis=1)
    scalars, _ = fields.generic(values, ["t", "p", "u", "flat"])
    np.testing.assert_allclose(scalars["t: total"], a.sum((1, 2, 3)))
    np.testing.assert_allclose(scalars["p: maximum"], 1 - 2 * a.min((1, 2, 3)))
    np.testing.assert_allclose(scalars["t and p: correlation"], -1)
    assert (
        np.abs(scalars["t and u: correlation"]).mean() < 0.1
        and (scalars["t and flat: correlation"] == 0).all()
    )
    pairs = [name for name in fields.generic(np.repeat(a, 7, 1), list("abcdefg"))[0] if "correlation" in name]
    assert len(pairs) == 6


def test_generic_statistics_tell_a_direction_and_a_correlation_that_got_lost():
    """Sets that are equal in the distribution of their pixels."""
    one, other = waves(60, 32, 32, 0, 4), waves(60, 32, 32, 4, 0)
    found = fields.compare("generic", other, one, ["u"])
    assert found["u: value"]["wasserstein"] < 0.05
    assert found["u: directional spectrum"]["difference"] > 20 * found["u: directional spectrum"]["floor"] + 1
    paired = np.concatenate([one, one], 1)
    apart = np.concatenate([one, one[::-1]], 1)
    found = fields.compare("generic", apart, paired, ["u", "v"])["u and v: correlation"]
    assert found["real"] == pytest.approx(1) and abs(found["generated"]) < 0.5


def test_pixels_of_large_sets_are_of_all_columns():
    """By every n-th pixel a field whose columns differ looked like one of its columns."""
    columns = np.broadcast_to(np.arange(64.0), (1500, 1, 64, 64))
    scalars, _ = fields.generic(columns, ["x"])
    assert len(scalars["x: value"]) == fields.MOST_VALUES
    assert np.unique(scalars["x: value"]).size == 64
