"""Statistics by which a field judges its images: laser speckle and particle jets.

Each field has scalars, one number per image, compared as distributions, and curves, one row per image,
compared as means. Values are in the user's units, (N,C,H,W). numpy and scipy only. Does not depend on models.
"""

from collections.abc import Callable, Sequence

import numpy as np

from shared.data.simulate import HALF_WIDTH

TRACK = 1.0  # GeV above which a cell counts as hit
RINGS = 12


def radial_mean(images: np.ndarray) -> np.ndarray:
    """Means over rings of whole pixels around the zero frequency.

    From (..., H, W) in FFT order to (..., H // 2 + 1).
    """
    size = images.shape[-1]
    frequency = np.fft.fftfreq(size) * size
    ring = np.rint(np.hypot(*np.meshgrid(frequency, frequency))).astype(int)
    return np.stack([images[..., ring == r].mean(-1) for r in range(size // 2 + 1)], axis=-1)


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Radial mean of |FFT2|^2 / (H W) of (..., H, W) less their mean, (..., H // 2 + 1). White noise: 1."""
    images = images - images.mean((-2, -1), keepdims=True)
    return radial_mean(np.abs(np.fft.fft2(images)) ** 2) / (images.shape[-2] * images.shape[-1])


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


FIELDS: dict[str, Callable[[np.ndarray], Statistics]] = {"speckle": speckle, "jets": jets}


def compare(field: str, generated: np.ndarray, real: np.ndarray) -> dict[str, dict]:
    """How far generated images are from real ones, beside how far two halves of the real ones are apart.

    Scalars: means of both, the Wasserstein-1 distance and its floor; the intensities of speckle also the
    Kolmogorov-Smirnov distance to the data and to exp(-I/<I>). Curves: both means and the sum of their
    differences over the sum of the real one.
    """
    # Real images are often sorted by class: no halves of one class each.
    shuffled = real[np.random.default_rng(0).permutation(len(real))]
    ours, our_curves = FIELDS[field](generated)
    theirs, their_curves = FIELDS[field](shuffled)
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
        return float(np.abs(a.mean(0) - b.mean(0)).sum() / b.mean(0).sum())

    half = len(real) // 2
    return {
        "difference": difference(generated, real),
        "floor": difference(real[:half], real[half:]),
        "generated": generated.mean(0).tolist(),
        "real": real.mean(0).tolist(),
    }
