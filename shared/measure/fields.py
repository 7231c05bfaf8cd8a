"""Statistics by which a field judges its images: laser speckle and particle jets.

Each field has scalars, one number per image, compared as distributions, and curves, one row per image, compared as means.
Values are in the user's units, (N,C,H,W). numpy and scipy only; knows nothing of models.
"""

import numpy as np

TRACK = 1.0  # GeV above which a cell counts as hit
HALF_WIDTH = 0.4  # of a jet image, in rapidity and azimuth
RINGS = 12


def radial_mean(images: np.ndarray) -> np.ndarray:
    """Means over rings of whole pixels around the zero frequency of (..., H, W) in FFT order: (..., H // 2 + 1)."""
    size = images.shape[-1]
    frequency = np.fft.fftfreq(size) * size
    ring = np.rint(np.hypot(*np.meshgrid(frequency, frequency))).astype(int)
    return np.stack([images[..., ring == r].mean(-1) for r in range(size // 2 + 1)], axis=-1)


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """Radially averaged |FFT2|^2 / (H W) of (..., H, W) after their mean is taken off: (..., H // 2 + 1); 1 for white noise."""
    images = images - images.mean((-2, -1), keepdims=True)
    return radial_mean(np.abs(np.fft.fft2(images)) ** 2) / (images.shape[-2] * images.shape[-1])


def grain_width(intensity: np.ndarray) -> np.ndarray:
    """Full width at half maximum, in pixels, of the autocovariance of images (N,H,W): the size of a speckle grain.

    By the Wiener-Khinchin theorem the inverse transform of the power spectrum (Goodman 2007, section 4.5); along rows and
    columns, averaged.
    """
    centred = intensity - intensity.mean((1, 2), keepdims=True)
    covariance = np.fft.ifft2(np.abs(np.fft.fft2(centred)) ** 2).real
    half = intensity.shape[-1] // 2
    profile = (covariance[:, 0, :half] + covariance[:, :half, 0]) / np.maximum(2 * covariance[:, 0, :1], 1e-30)  # (N, lags)
    below = np.argmax(np.pad(profile, ((0, 0), (0, 1)), constant_values=-1) < 0.5, axis=1)  # the first lag under half
    rows = np.arange(len(profile))
    high, low = profile[rows, below - 1], profile[rows, np.minimum(below, half - 1)]
    return 2 * np.maximum(0, below - 1 + (high - 0.5) / np.maximum(high - low, 1e-12))


def speckle(values: np.ndarray) -> tuple[dict, dict]:
    """contrast: deviation over mean, 1 in fully developed speckle; grain: its width in pixels; intensity: I / <I> of single
    pixels, exp(-I / <I>) there; spectrum: power over radial frequency."""
    intensity = values[:, 0].astype(np.float64)
    mean = np.maximum(intensity.mean((1, 2), keepdims=True), 1e-12)
    relative = intensity / mean
    scalars = {
        "contrast": relative.std((1, 2)),
        "grain width (px)": grain_width(intensity),
        "intensity I/<I>": relative[:, ::7, ::7].ravel(),
    }
    return scalars, {"power spectrum": power_spectrum(relative)}


def jets(values: np.ndarray) -> tuple[dict, dict]:
    """multiplicity: cells of the first channel above 1 GeV; energy: the sum of all cells in GeV; girth: mean distance from
    the axis, weighted by energy; occupancy: share of all cells above 1 GeV; radial profile: share of energy by distance."""
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
    return scalars, {"radial profile": np.stack([energy[:, ring == r].sum(1) / total for r in range(RINGS)], axis=1)}


FIELDS = {"speckle": speckle, "jets": jets}


def compare(field: str, generated: np.ndarray, real: np.ndarray) -> dict[str, dict]:
    """How far generated images are from real ones, beside how far two halves of the real ones are from each other.

    Scalars: means of both, the Wasserstein-1 distance and its floor; the intensities of speckle also the Kolmogorov-Smirnov
    distance to the data and to exp(-I/<I>). Curves: both means and the sum of their differences over the sum of the real one.
    """
    from scipy import stats

    real = real[np.random.default_rng(0).permutation(len(real))]  # often sorted by class: no halves of one class each
    (ours, our_curves), (theirs, their_curves) = FIELDS[field](generated), FIELDS[field](real)
    table = {}
    for name, found in ours.items():
        data = theirs[name]
        half = len(data) // 2
        row = {
            "generated": found.mean(), "real": data.mean(),
            "wasserstein": stats.wasserstein_distance(found, data),
            "floor": stats.wasserstein_distance(data[:half], data[half:]),
        }  # fmt: skip
        if name.startswith("intensity"):
            row["ks_to_data"] = stats.ks_2samp(found, data).statistic
            row["ks_to_exponential"] = stats.kstest(found, "expon").statistic
            row["ks_of_data_to_exponential"] = stats.kstest(data, "expon").statistic
        table[name] = {key: float(value) for key, value in row.items()}
    for name, found in our_curves.items():
        data, half = their_curves[name], len(their_curves[name]) // 2

        def gap(a, b):
            return float(np.abs(a.mean(0) - b.mean(0)).sum() / b.mean(0).sum())

        table[name] = {"difference": gap(found, data), "floor": gap(data[:half], data[half:])}
        table[name] |= {"generated": found.mean(0).tolist(), "real": data.mean(0).tolist()}
    return table
