"""What the latents of a VAE do: numbers and pictures."""

from pathlib import Path


def examine(vae, recipe, x, mean, logvar, device) -> dict:
    """The numbers: what stands in doctor.json."""
    import torch

    from shared import trained
    from shared.measure import fields
    from stage1_vae import diagnostics

    spread = diagnostics.Spread()
    x_hat = trained.decode(vae, mean, device)
    spread.add(x, x_hat)
    numbers = {name: value.item() for name, value in spread.numbers().items()}
    active, dz = diagnostics.active_units(mean), mean[0].numel()
    beta = recipe.stage1.loss_weights.kl
    centre, width = diagnostics.aggregate(mean, logvar)
    found = {"images": len(x), "dz": dz, "active_units": active}
    if not vae.deterministic:
        bits = diagnostics.kl_bits(mean, logvar)
        found |= {"bits_per_dimension": bits.mean().item(), "bits": bits.sum().item()}
    found |= {"aggregate_mean": centre.abs().mean().item(), "aggregate_std": width.mean().item()} | numbers
    found["times_better_than_mean_image"] = numbers["mean_image_mse"] / max(numbers["mse"], 1e-12)
    key = torch.Generator().manual_seed(0)
    noise = torch.randn(mean.shape, generator=key) * mean.std(0, correction=0)
    found["mse_with_latent_noise"] = {
        str(part): (trained.decode(vae, mean + part * noise, device) - x).square().mean().item() for part in (0.1, 0.25, 0.5, 1.0)
    }
    if mean.shape[-1] == mean.shape[-2] >= 4:
        found["latent_spectrum"] = fields.power_spectrum(mean.double().numpy()).mean((0, 1)).tolist()
    if len(x) >= diagnostics.ENOUGH:
        found["collapse"] = diagnostics.collapse(**numbers, active=active, dz=dz, beta=beta)
    return found


def neighbours(mean, labels, seen_mean, seen_labels) -> float:
    """Share of images whose class the 10 nearest training latents vote for (all of them where there are fewer)."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(min(10, len(seen_mean))).fit(seen_mean.flatten(1), seen_labels)
    return float(classifier.score(mean.flatten(1), labels))


def plane(mean):
    """The map of latents (N,c,h,w) to points (N,2): themselves if there are two, else the first two principal components."""
    from sklearn.decomposition import PCA

    flat = mean.flatten(1).numpy()
    if flat.shape[1] == 2:
        return lambda z: z.flatten(1).numpy()
    pca = PCA(2, random_state=0).fit(flat)
    return lambda z: pca.transform(z.flatten(1).numpy())


def draw(folder: Path, vae, x, labels, names, mean, logvar, found: dict, device) -> None:
    """The pictures of a VAE as it is."""
    import torch

    from shared import trained
    from shared.show import grids, plots
    from stage1_vae import diagnostics

    centre, width = (part.flatten().numpy() for part in diagnostics.aggregate(mean, logvar))
    bits = None if vae.deterministic else diagnostics.kl_bits(mean, logvar).flatten()
    spectrum = found.get("latent_spectrum")
    plots.latents(None if bits is None else bits.numpy(), centre, width, spectrum).savefig(folder / "latents.png")
    if mean[0].numel() > 1 and len(mean) > 1:
        title = "latents" if mean[0].numel() == 2 else "latents, two principal components"
        plots.scatter(plane(mean)(mean), labels, names, title).savefig(folder / "latent_space.png")
    if mean[0].numel() == 2:
        ticks = torch.linspace(-3, 3, 15)
        z = torch.stack(torch.meshgrid(ticks, -ticks, indexing="xy"), dim=-1).reshape(-1, *mean.shape[1:])
        grids.grid(trained.decode(vae, z, device), 15).save(folder / "manifold.png")
    if bits is not None:
        rows = torch.arange(min(6, len(x))).repeat_interleave(7)
        z = mean[rows] + (0.5 * logvar[rows]).exp() * torch.randn(mean[rows].shape, generator=torch.Generator().manual_seed(0))
        tiles = torch.cat([x[: min(6, len(x)), None], trained.decode(vae, z, device).unflatten(0, (-1, 7))], dim=1)
        grids.grid(tiles.flatten(0, 1), 8).save(folder / "stochastic.png")
    travel(folder, vae, mean, device)


def travel(folder: Path, vae, mean, device) -> None:
    """traversal.gif: a row for an image, a column for a latent, the eight that vary most; interpolation.gif: ways between images."""
    import torch

    from shared import trained
    from shared.show import grids

    flat = mean.flatten(1)
    order, deviation, images = flat.var(0, correction=0).argsort(descending=True)[:8], flat.std(0, correction=0), flat[:4]
    frames = []
    for step in torch.linspace(-3, 3, 16):
        z = images.repeat_interleave(len(order), 0)
        moved = order.repeat(len(images))
        z[torch.arange(len(z)), moved] = flat.mean(0)[moved] + step * deviation[moved]
        frames.append(grids.grid(trained.decode(vae, z.reshape(-1, *mean.shape[1:]), device), len(order)))
    grids.save_gif(frames, folder / "traversal.gif")
    ways = min(8, len(mean) // 2)
    if not ways:
        return
    a, b = mean[:ways], mean[ways : 2 * ways]
    frames = [grids.grid(trained.decode(vae, torch.lerp(a, b, float(t)), device)) for t in torch.linspace(0, 1, 16)]
    grids.save_gif(frames, folder / "interpolation.gif")
    still = [trained.decode(vae, torch.lerp(a, b, float(t)), device) for t in torch.linspace(0, 1, 10)]
    grids.grid(torch.stack(still, dim=1).flatten(0, 1), 10).save(folder / "interpolation.png")


def history(run: Path, x, labels, names, last, device) -> None:
    """GIFs over the training, from the checkpoints that were kept: reconstructions, and latents in the last one's plane."""
    import numpy as np

    from shared import disk, trained
    from shared.show import grids, plots
    from shared.training import checkpoint
    from stage1_vae.model import DeepVAE

    kept = sorted((run / "stage1_vae" / "checkpoints").glob("step_*"))
    if len(kept) < 5 or last[0].numel() < 2 or len(x) < 2:
        return
    project, spaces, shown = plane(last), [], []
    for folder in kept:
        vae = disk.load_module(DeepVAE, folder / "vae").to(device).eval()
        mean, _ = trained.encode(vae, x, device)
        spaces.append((checkpoint.step_of(folder), project(mean)))
        shown.append(grids.pairs(x[:32], trained.decode(vae, mean[:32], device)))
    grids.save_gif(shown, run / "report" / "reconstructions.gif", back=False)
    everywhere = np.concatenate([points for _, points in spaces[len(spaces) // 2 :]])
    bounds = np.quantile(everywhere, [0.002, 0.998], axis=0)
    figures = [plots.scatter(points, labels, names, f"step {step:,}", bounds) for step, points in spaces]
    grids.save_gif([grids.as_image(figure) for figure in figures], run / "report" / "latent_space.gif", back=False)
