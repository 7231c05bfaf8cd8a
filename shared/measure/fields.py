"""Statistics by which a field judges its images: laser speckle, particle jets, and arrays of any kind.

Each field has scalars, one number per image, compared as distributions, and curves, one row per image,
compared as means. Values are in the user's units, (N,C,H,W). numpy and scipy only. Does not depend on models.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from shared.data.simulate import HALF_WIDTH

TRACK = 1.0  # GeV above which a cell counts as hit
RINGS = 12
SECTORS = 8  # directions between 0 and 180 degrees
MOST_VALUES = 500_000  # of pixels whose distribution is compared, a channel
MOST_PAIRED = 4  # channels of which every two are correlated; of more, neighbours


def frequencies(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of an FFT, in cycles per pixel: the radius and the direction in [0, pi), each (H,W)."""
    x, y = np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))
    return np.hypot(x, y), np.arctan2(y, x) % np.pi


def radial_mean(images: np.ndarray) -> np.ndarray:
    """Means over rings around the zero frequency, as wide as the shorter side can tell apart.

    From (..., H, W) in FFT order to (..., min(H,W) // 2 + 1).
    """
    size = min(images.shape[-2:])
    radius, _ = frequencies(*images.shape[-2:])
    ring = np.rint(radius * size).astype(int)
    return np.stack([images[..., ring == r].mean(-1) for r in range(size // 2 + 1)], axis=-1)


def directional_mean(images: np.ndarray) -> np.ndarray:
    """Means over sectors of direction, the first around the x axis; up to half a cycle per pixel.

    From (..., H, W) in FFT order to (..., SECTORS).
    """
    radius, direction = frequencies(*images.shape[-2:])
    sector = np.rint(direction / np.pi * SECTORS).astype(int) % SECTORS
    sector[(radius == 0) | (radius > 0.5)] = -1
    means = [images[..., sector == s].mean(-1) for s in range(SECTORS) if (sector == s).any()]
    return np.stack(means, axis=-1)


def power(images: np.ndarray) -> np.ndarray:
    """|FFT2|^2 / (H W) of (..., H, W) less their mean, in FFT order. White noise of variance 1: 1."""
    images = images - images.mean((-2, -1), keepdims=True)
    return np.abs(np.fft.fft2(images)) ** 2 / (images.shape[-2] * images.shape[-1])


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Radial mean of the power of (..., H, W), (..., min(H,W) // 2 + 1)."""
    return radial_mean(power(images))


def grain_width(intensity: np.ndarray) -> np.ndarray:
    """The size of a speckle grain in pixels, for each of the images (N,H,W).

    It is the full width at half maximum of the autocovariance along rows and columns, averaged. By the
    Wiener-Khinchin theorem the autocovariance is the inverse transform of the power spectrum (Goodman 2007,
    section 4.5).
    """
    centred = intensity - intensity.mean((1, 2), keepdims=True)
    covariance = np.fft.ifft2(np.abs(np.fft.fft2(centred)) ** 2).real
    half = intensity.shape[-1] // 2
    profile = covariance[:, 0, :half] + covariance[:, :half, 0]  # (N, lags)
    profile = profile / np.maximum(2 * covariance[:, 0, :1], 1e-30)
    padded = np.pad(profile, ((0, 0), (0, 1)), constant_values=-1)
    below = np.argmax(padded < 0.5, axis=1)  # the first lag under half
    rows = np.arange(len(profile))
    high = profile[rows, below - 1]
    low = profile[rows, np.minimum(below, half - 1)]
    return 2 * np.maximum(0, below - 1 + (high - 0.5) / np.maximum(high - low, 1e-12))


def moments(values: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each channel of (N,C,H,W), over images and pixels, by the channel's name."""
    planes = np.moveaxis(values, 1, 0).astype(np.float64)
    return {
        name: {"mean": float(plane.mean()), "deviation": float(plane.std())}
        for name, plane in zip(names, planes, strict=True)
    }


Statistics = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # scalars (N,) and curves (N,K) by name


def speckle(values: np.ndarray) -> Statistics:
    """The statistics of laser speckle.

    contrast: deviation over mean, 1 in fully developed speckle
    grain: its width in pixels
    intensity: I / <I> of single pixels, distributed as exp(-I / <I>) in fully developed speckle
    spectrum: power over radial frequency
    """
    intensity = values[:, 0].astype(np.float64)
    mean = np.maximum(intensity.mean((1, 2), keepdims=True), 1e-12)
    relative = intensity / mean
    scalars = {
        "contrast": relative.std((1, 2)),
        "grain width (px)": grain_width(intensity),
        "intensity I/<I>": relative[:, ::7, ::7].ravel(),
    }
    return scalars, {"power spectrum": power_spectrum(relative)}


def jets(values: np.ndarray) -> Statistics:
    """The statistics of particle jets.

    multiplicity: cells of the first channel above 1 GeV
    energy: the sum of all cells in GeV
    girth: mean distance from the axis, weighted by energy
    occupancy: share of all cells above 1 GeV
    radial profile: share of energy by distance
    """
    values = np.maximum(values.astype(np.float64), 0)
    size = values.shape[-1]
    axis = ((np.arange(size) + 0.5) / size * 2 - 1) * HALF_WIDTH
    radius = np.hypot(*np.meshgrid(axis, axis))
    energy = values.sum(1)  # (N,H,W)
    total = np.maximum(energy.sum((1, 2)), 1e-12)
    ring = np.minimum((radius / HALF_WIDTH * RINGS).astype(int), RINGS)
    scalars = {
        "multiplicity": (values[:, 0] > TRACK).sum((1, 2)).astype(float),
        "energy (GeV)": energy.sum((1, 2)),
        "girth": (energy * radius).sum((1, 2)) / total,
        "occupancy": (values > TRACK).mean((1, 2, 3)),
    }
    return scalars, {
        "radial profile": np.stack([energy[:, ring == r].sum(1) / total for r in range(RINGS)], axis=1)
    }


def generic(values: np.ndarray, names: Sequence[str]) -> Statistics:
    """The statistics of arrays of any kind, of each channel by its name.

    value: of single pixels
    total, maximum: of an image
    correlation: of two channels, over the pixels of an image
    radial spectrum, directional spectrum: power over frequency, and over its direction
    """
    planes = np.moveaxis(values, 1, 0).astype(np.float64)  # (C,N,H,W)
    # Drawn, not every n-th: n divides a width, and a few columns are not the image.
    some = np.random.default_rng(0).choice(planes[0].size, min(planes[0].size, MOST_VALUES), replace=False)
    some.sort()
    scalars, curves = {}, {}
    for name, plane in zip(names, planes, strict=True):
        scalars[f"{name}: value"] = plane.ravel()[some]
        scalars[f"{name}: total"] = plane.sum((1, 2))
        scalars[f"{name}: maximum"] = plane.max((1, 2))
        spectrum = power(plane)
        curves[f"{name}: radial spectrum"] = radial_mean(spectrum)
        curves[f"{name}: directional spectrum"] = directional_mean(spectrum)
    numbers = range(len(names))
    few = len(names) <= MOST_PAIRED
    for a, b in itertools.combinations(numbers, 2) if few else itertools.pairwise(numbers):
        scalars[f"{names[a]} and {names[b]}: correlation"] = _correlation(planes[a], planes[b])
    return scalars, curves


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, of each two images of (N,H,W); 0 where one of them is flat."""
    a, b = (images - images.mean((1, 2), keepdims=True) for images in (a, b))
    scale = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return (a * b).sum((1, 2)) / np.where(scale > 0, scale, 1)


def of_field(field: str, values: np.ndarray, names: Sequence[str]) -> Statistics:
    """The statistics of a field, by its name in data.field.

    Arguments:
        field: generic, speckle or jets.
        values: in the user's units, (N,C,H,W).
        names: of the channels.
    """
    if field == "generic":
        return generic(values, names)
    return {"speckle": speckle, "jets": jets}[field](values)


def compare(field: str, generated: np.ndarray, real: np.ndarray, names: Sequence[str]) -> dict[str, dict]:
    """How far generated images are from real ones, beside how far two halves of the real ones are apart.

    Scalars: means of both, the Wasserstein-1 distance and its floor; the intensities of speckle also the
    Kolmogorov-Smirnov distance to the data and to exp(-I/<I>). Curves: both means and the sum of their
    differences over the sum of the real one.
    """
    # Real images are often sorted by class: no halves of one class each.
    shuffled = real[np.random.default_rng(0).permutation(len(real))]
    ours, our_curves = of_field(field, generated, names)
    theirs, their_curves = of_field(field, shuffled, names)
    scalars = {name: _compare_scalars(name, ours[name], theirs[name]) for name in ours}
    return scalars | {name: _compare_curves(our_curves[name], their_curves[name]) for name in our_curves}


def _compare_scalars(name: str, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    from scipy import stats

    half = len(real) // 2
    row = {
        "generated": generated.mean(),
        "real": real.mean(),
        "wasserstein": stats.wasserstein_distance(generated, real),
        "floor": stats.wasserstein_distance(real[:half], real[half:]),
    }
    if name.startswith("intensity"):
        row["ks_to_data"] = stats.ks_2samp(generated, real).statistic
        row["ks_to_exponential"] = stats.kstest(generated, "expon").statistic
        row["ks_of_data_to_exponential"] = stats.kstest(real, "expon").statistic
    return {key: float(value) for key, value in row.items()}


def _compare_curves(generated: np.ndarray, real: np.ndarray) -> dict[str, float | list[float]]:
    def difference(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a.mean(0) - b.mean(0)).sum() / max(b.mean(0).sum(), 1e-30))

    half = len(real) // 2
    return {
        "difference": difference(generated, real),
        "floor": difference(real[:half], real[half:]),
        "generated": generated.mean(0).tolist(),
        "real": real.mean(0).tolist(),
    }
