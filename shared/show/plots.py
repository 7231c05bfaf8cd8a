"""Plots for people: curves, latents, distributions, trade-offs. Numbers come in, matplotlib figures go out.

Does not depend on runs or models. Dimension key: N images, dz latent dimensions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shared.config import InputError

try:
    from matplotlib.figure import Figure
except ImportError:
    raise InputError("pictures of a run need matplotlib: pip install 'latent-stack[metrics]'") from None

BLUE = "#2563eb"
ORANGE = "#ea7317"
GREY = "#9aa1ab"
CLASSES = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd",
    "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip

MOST_PANELS = 30  # of scalars, and of curves

Pair = tuple[np.ndarray, np.ndarray]


def _panels(count: int, columns: int = 3, size: tuple[float, float] = (3.6, 2.5)) -> tuple[Figure, list]:
    """A figure of `count` plain axes in rows."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=110)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _name(axis: Any, title: str, x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def curves(groups: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]]) -> Figure:
    """A panel per group {title: {line: (steps, values)}}; values over more than two decades on log scale."""
    figure, axes = _panels(len(groups))
    for axis, (title, lines) in zip(axes, groups.items(), strict=True):
        for (name, (steps, values)), colour in zip(lines.items(), (BLUE, ORANGE), strict=False):
            axis.plot(steps, values, color=colour, lw=1.3, label=name)
        everything = np.concatenate([np.asarray(values, float) for _, values in lines.values()])
        if everything.min() > 0 and everything.max() > 100 * everything.min():
            axis.set_yscale("log")
        if len(lines) > 1:
            axis.legend(fontsize=8, frameon=False)
        _name(axis, title, "step")
    return figure


def latents(
    bits: np.ndarray | None, centre: np.ndarray, width: np.ndarray, spectrum: Sequence[float] | None
) -> Figure:
    """A VAE's latents in up to three panels.

    Bits per dimension (dz,), sorted; mean and deviation of the aggregate posterior (dz,); power over radial
    frequency.
    """
    figure, panels = _panels(1 + (bits is not None) + (spectrum is not None))
    axes = iter(panels)
    if bits is not None:
        axis = next(axes)
        axis.bar(np.arange(len(bits)), np.sort(bits)[::-1], color=BLUE, width=1.0 if len(bits) > 20 else 0.7)
        _name(axis, f"information: {bits.sum():.1f} bits in all", "latent dimension, sorted", "bits")
    axis = next(axes)
    axis.scatter(centre, width, s=12 if len(centre) > 20 else 60, color=BLUE, alpha=0.6, lw=0)
    axis.scatter([0], [1], marker="+", s=90, color=ORANGE, label="prior")
    axis.legend(fontsize=8, frameon=False)
    _name(axis, "aggregate posterior", "mean", "deviation")
    if spectrum is not None:
        axis = next(axes)
        axis.plot(np.arange(1, len(spectrum)), spectrum[1:], "o-", color=BLUE, ms=3)
        axis.set_yscale("log")
        _name(axis, "power spectrum of the latents", "radial frequency", "power")
    return figure


def scatter(
    points: np.ndarray, labels: Any, names: Sequence[str], title: str, bounds: np.ndarray | None = None
) -> Figure:
    """Image latents as points (N,2), coloured by class (N,). bounds: [[x0, y0], [x1, y1]] to draw within."""
    figure, (axis,) = _panels(1, size=(5.6, 5.0))
    if labels is None:
        axis.scatter(*points.T, s=5, color=BLUE, alpha=0.5, lw=0)
    else:
        for number, name in enumerate(names):
            colour = CLASSES[number % len(CLASSES)]
            axis.scatter(*points[labels == number].T, s=5, color=colour, alpha=0.6, lw=0, label=name)
        if len(names) <= 20:
            axis.legend(fontsize=8, frameon=False, markerscale=3, bbox_to_anchor=(1, 1), loc="upper left")
    if bounds is not None:
        axis.set_xlim(bounds[0, 0], bounds[1, 0])
        axis.set_ylim(bounds[0, 1], bounds[1, 1])
    axis.set_aspect("equal", adjustable="datalim" if bounds is None else "box")
    _name(axis, title)
    return figure


def statistics(scalars: Mapping[str, Pair], curves: Mapping[str, Pair]) -> Figure:
    """A field's statistics of generated and real images: histograms of the scalars, means of the curves.

    Of many channels the first ones are drawn.

    Arguments:
        scalars: {name: (generated (N,), real (M,))}, one number per image.
        curves: {name: (generated (N,K), real (M,K))}, one row per image.
    """
    scalars, curves = (dict(list(part.items())[:MOST_PANELS]) for part in (scalars, curves))
    figure, axes = _panels(len(scalars) + len(curves))
    for axis, (name, (ours, theirs)) in zip(axes, scalars.items(), strict=False):
        low, high = np.quantile(np.concatenate([ours, theirs]), [0.001, 0.999])
        bins = np.linspace(low, max(high, low + 1e-9), 40)
        axis.hist(theirs, bins, density=True, color=GREY, alpha=0.7, label="real")
        axis.hist(ours, bins, density=True, histtype="step", lw=1.6, color=ORANGE, label="generated")
        axis.legend(fontsize=8, frameon=False)
        if name.startswith("intensity"):
            axis.set_yscale("log")
        _name(axis, name)
    for axis, (name, (ours, theirs)) in zip(axes[len(scalars) :], curves.items(), strict=True):
        axis.plot(theirs.mean(0), color=GREY, lw=4, label="real")
        axis.plot(ours.mean(0), color=ORANGE, lw=1.6, label="generated")
        axis.set_yscale("log")
        axis.set_ylim(bottom=theirs.mean(0).max() * 1e-5)
        axis.legend(fontsize=8, frameon=False)
        _name(axis, name)
    return figure


def trade_off(key: str, values: Sequence[float], rows: Mapping[str, Sequence], best: float | None) -> Figure:
    """A panel per measure over one key of several runs; a dashed line at the value whose samples are best."""
    figure, axes = _panels(len(rows))
    for axis, (name, measured) in zip(axes, rows.items(), strict=True):
        axis.plot(values, measured, "o-", color=BLUE)
        if min(values) > 0 and max(values) >= 8 * min(values):
            axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        if best is not None:
            axis.axvline(best, color=ORANGE, ls="--", lw=1)
        _name(axis, name, key)
    return figure
