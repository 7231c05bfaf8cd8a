"""What the latents of a VAE do: numbers, pictures, and GIFs over the training.

Dimension key: N images, C H W pixels in [-1, 1], c h w latents, dz = c*h*w.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared import disk
from shared.measure import fields
from shared.measure.images import decode, encode
from shared.run import RunFolder
from shared.show import grids, plots
from shared.training import checkpoint
from stage1_vae import diagnostics
from stage1_vae.pretrained import load_vae

HISTORY = 5  # checkpoints from which on a training is shown as a GIF
NOISE_LEVELS = (0.1, 0.25, 0.5, 1.0)  # in deviations of a latent

Device = torch.device | str
Decoded = Callable[[torch.Tensor], torch.Tensor]  # latents (N,c,h,w) to what is shown of them


def examine(
    vae: Any, beta: float, x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor, device: Device
) -> dict[str, Any]:
    """The numbers: what stands in doctor.json.

    Arguments:
        beta: the weight of the KL term.
        x: held-out images, (N,C,H,W).
        mean, logvar: their moments, (N,c,h,w).
    """
    variance = diagnostics.PixelVariance()
    variance.add(x, decode(vae, mean, device))
    numbers = {name: value.item() for name, value in variance.numbers().items()}
    active = diagnostics.active_units(mean)
    dz = mean[0].numel()
    centre, width = diagnostics.aggregate(mean, logvar)
    found: dict[str, Any] = {"images": len(x), "dz": dz, "active_units": active}
    if not vae.deterministic:
        bits = diagnostics.kl_bits(mean, logvar)
        found["bits_per_dimension"] = bits.mean().item()
        found["bits"] = bits.sum().item()
    found["aggregate_mean"] = centre.abs().mean().item()
    found["aggregate_std"] = width.mean().item()
    found |= numbers
    found["times_better_than_mean_image"] = numbers["mean_image_mse"] / max(numbers["mse"], 1e-12)
    found["mse_with_latent_noise"] = _errors_with_noise(vae, x, mean, device)
    if min(mean.shape[-2:]) >= 4:
        found["latent_spectrum"] = fields.power_spectrum(mean.double().numpy()).mean((0, 1)).tolist()
    if len(x) >= diagnostics.ENOUGH:
        found["collapse"] = diagnostics.collapse(**numbers, active=active, dz=dz, beta=beta)
    return found


def _errors_with_noise(vae: Any, x: torch.Tensor, mean: torch.Tensor, device: Device) -> dict[str, float]:
    """The squared error of images decoded from noisy latents, by the level of the noise."""
    key = torch.Generator().manual_seed(0)
    noise = torch.randn(mean.shape, generator=key) * mean.std(0, correction=0)
    errors = {}
    for level in NOISE_LEVELS:
        x_hat = decode(vae, mean + level * noise, device)
        errors[str(level)] = (x_hat - x).square().mean().item()
    return errors


def neighbours(
    mean: torch.Tensor, labels: torch.Tensor, seen_mean: torch.Tensor, seen_labels: torch.Tensor
) -> float:
    """Share of images whose class the 10 nearest training latents (or all, if there are fewer) vote for."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(min(10, len(seen_mean))).fit(seen_mean.flatten(1), seen_labels)
    return float(classifier.score(mean.flatten(1), labels))


def plane(mean: torch.Tensor) -> Callable[[torch.Tensor], np.ndarray]:
    """The map of latents (N,c,h,w) to (N,2): themselves if there are two, else two principal components."""
    from sklearn.decomposition import PCA

    flat = mean.flatten(1).numpy()
    if flat.shape[1] == 2:
        return lambda z: z.flatten(1).numpy()
    pca = PCA(2, random_state=0).fit(flat)
    return lambda z: pca.transform(z.flatten(1).numpy())


# ---------------------------------------------------------------- pictures


def draw(
    folder: Path,
    vae: Any,
    x: torch.Tensor,
    labels: torch.Tensor | None,
    names: Sequence[str],
    mean: torch.Tensor,
    logvar: torch.Tensor,
    device: Device,
    spectrum: Sequence[float] | None,
    grey_levels: bool,
) -> None:
    """The pictures of a VAE as it is, from held-out images (N,C,H,W) and their moments (N,c,h,w)."""

    def decoded(z: torch.Tensor) -> torch.Tensor:
        return grids.pictures(decode(vae, z, device), grey_levels)

    centre, width = (part.flatten().numpy() for part in diagnostics.aggregate(mean, logvar))
    bits = None if vae.deterministic else diagnostics.kl_bits(mean, logvar).flatten().numpy()
    plots.latents(bits, centre, width, spectrum).savefig(folder / "latents.png")
    dz = mean[0].numel()
    if dz > 1 and len(mean) > 1:
        title = "latents" if dz == 2 else "latents, two principal components"
        plots.scatter(plane(mean)(mean), labels, names, title).savefig(folder / "latent_space.png")
    if dz == 2:
        _draw_manifold(folder / "manifold.png", decoded, mean.shape[1:])
    if not vae.deterministic:
        _draw_draws(folder / "stochastic.png", decoded, grids.pictures(x, grey_levels), mean, logvar)
    _draw_traversal(folder / "traversal.gif", decoded, mean)
    _draw_interpolations(folder, decoded, mean)


def _draw_manifold(path: Path, decoded: Decoded, shape: Sequence[int]) -> None:
    """The plane of two latents, decoded over [-3, 3] x [-3, 3]."""
    ticks = torch.linspace(-3, 3, 15)
    points = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), dim=-1)
    grids.grid(decoded(points.reshape(-1, *shape)), 15).save(path)


def _draw_draws(
    path: Path, decoded: Decoded, x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor
) -> None:
    """A row: an image and reconstructions of seven draws from its posterior."""
    count = min(6, len(x))
    rows = torch.arange(count).repeat_interleave(7)
    noise = torch.randn(mean[rows].shape, generator=torch.Generator().manual_seed(0))
    z = mean[rows] + (0.5 * logvar[rows]).exp() * noise
    tiles = torch.cat([x[:count, None], decoded(z).unflatten(0, (-1, 7))], dim=1)
    grids.grid(tiles.flatten(0, 1), 8).save(path)


def _draw_traversal(path: Path, decoded: Decoded, mean: torch.Tensor) -> None:
    """A row for an image, a column for one of the eight latents that vary most, moved by three deviations."""
    flat = mean.flatten(1)
    order = flat.var(0, correction=0).argsort(descending=True)[:8]
    deviation = flat.std(0, correction=0)
    images = flat[:4]
    moved = order.repeat(len(images))
    pictures = []
    for step in torch.linspace(-3, 3, 16):
        z = images.repeat_interleave(len(order), 0)
        z[torch.arange(len(z)), moved] = flat.mean(0)[moved] + step * deviation[moved]
        pictures.append(grids.grid(decoded(z.reshape(-1, *mean.shape[1:])), len(order)))
    grids.save_gif(pictures, path)


def _draw_interpolations(folder: Path, decoded: Decoded, mean: torch.Tensor) -> None:
    """Straight lines between the latents of held-out images, as a GIF and as a still."""
    count = min(8, len(mean) // 2)
    if not count:
        return
    begin, end = mean[:count], mean[count : 2 * count]

    def between(steps: int) -> list[torch.Tensor]:
        return [decoded(torch.lerp(begin, end, float(t))) for t in torch.linspace(0, 1, steps)]

    grids.save_gif([grids.grid(images) for images in between(16)], folder / "interpolation.gif")
    grids.grid(torch.stack(between(10), dim=1).flatten(0, 1), 10).save(folder / "interpolation.png")


def draw_history(
    run: RunFolder,
    x: torch.Tensor,
    labels: torch.Tensor | None,
    names: Sequence[str],
    last: torch.Tensor,
    device: Device,
    grey_levels: bool,
) -> None:
    """GIFs over the training, from the kept checkpoints: reconstructions, and latents in the last's plane.

    last: posterior means (N,c,h,w) of the newest checkpoint.
    """
    kept = disk.checkpoints(run.stage("stage1").checkpoints)
    if len(kept) < HISTORY or last[0].numel() < 2 or len(x) < 2:
        return
    project = plane(last)
    spaces, reconstructions = [], []
    for folder in kept:
        vae = load_vae(folder / "vae").to(device).eval()
        mean, _ = encode(vae, x, device)
        spaces.append((checkpoint.step_of(folder), project(mean)))
        both = (x[:32], decode(vae, mean[:32], device))
        reconstructions.append(grids.pairs(*(grids.pictures(part, grey_levels) for part in both)))
    grids.save_gif(reconstructions, run.report / "reconstructions.gif", back=False)
    later = np.concatenate([points for _, points in spaces[len(spaces) // 2 :]])
    bounds = np.quantile(later, [0.002, 0.998], axis=0)
    figures = [plots.scatter(points, labels, names, f"step {step:,}", bounds) for step, points in spaces]
    grids.save_gif(
        [grids.as_image(figure) for figure in figures], run.report / "latent_space.gif", back=False
    )
