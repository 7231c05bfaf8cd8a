"""Reconstructions against their images.

Dimension key: B batch, C H W pixels in [-1, 1], c h w latents.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm import tqdm

from shared.config import InputError, say
from shared.data.batches import in_order
from shared.data.splits import Pixels
from shared.measure import images
from shared.recipe import Recipe
from shared.sampling.transforms import ValueTransform
from shared.training.keyed import generator
from shared.training.similarity import load_lpips, psnr, ssim
from stage1_vae import diagnostics, losses
from stage1_vae.config import MS_SSIM_WINDOW
from stage1_vae.losses import Perceptual, kl_per_dimension


def reconstruct(
    recipe: Recipe, vae: Any, transform: ValueTransform, part: Pixels, accelerator: Accelerator
) -> dict[str, Any]:
    """Means over the images of a split.

    mse ... lpips: of the decoded posterior mean. bce, kl: nats per image, summed over pixels and latents,
    with z drawn from the posterior: their sum is the negative ELBO where pixels are taken as probabilities.
    mean_image_...: of the best image that is the same for all. rmse: of each channel in its own units, where
    there are several of an array.
    """
    activity = recipe.stage1.activity_weight if recipe.stage1.loss_weights.weighted_mse else None
    size = images.batch_size(recipe.data)
    variance = diagnostics.PixelVariance(activity)
    key = generator("evaluate", device=accelerator.device)
    lpips = perceptual(recipe, transform.integer, accelerator.device)
    sums: dict[str, float] = {}
    means = images.Rows(len(part))
    squares = torch.zeros(recipe.data.channels, dtype=torch.float64)
    in_units = not transform.integer and len(squares) > 1
    with torch.inference_mode(), tqdm(total=len(part), unit="img", desc="reconstructions") as bar:
        for batch in in_order(part, range(len(part)), size, accelerator):
            x = transform(batch["raw"].to(accelerator.device))
            with accelerator.autocast():
                posterior = vae.encode(x).latent_dist
                x_hat = vae.decode(posterior.mean).sample
                logits = None
                if vae.config.output_activation == "sigmoid":
                    logits = vae.logits(posterior.sample(key))
            scores = _of_pixels(recipe, x_hat, x, lpips, activity) | _of_the_elbo(vae, posterior, logits, x)
            for name, value in scores.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(x)
            if in_units:
                errors = transform.inverse(x_hat) - transform.inverse(x)
                squares += errors.square().mean((2, 3)).cpu().double().sum(0)
            means.add(posterior.mean)
            variance.add(x, x_hat)
            bar.update(len(x))
    found: dict[str, Any] = {name: value / len(part) for name, value in sums.items()}
    found |= {name: value.item() for name, value in variance.numbers().items()}
    found["active_units"] = diagnostics.active_units(means.all())
    if in_units:
        roots = (squares / len(part)).sqrt().tolist()
        found["rmse"] = dict(zip(part.source.channel_names, roots, strict=True))
    return found


def _of_pixels(
    recipe: Recipe, x_hat: torch.Tensor, x: torch.Tensor, lpips: Perceptual | None, activity: float | None
) -> dict[str, torch.Tensor]:
    """How alike reconstructions (B,C,H,W) and images are, each a mean."""
    scores = {"l1": F.l1_loss(x_hat, x), "psnr": psnr(x_hat, x).mean(), "ssim": ssim(x_hat, x).mean()}
    if min(x.shape[-2:]) >= MS_SSIM_WINDOW:
        scores["ms_ssim"] = 1 - losses.ms_ssim_term(x_hat, x)
    if lpips is not None:
        name = f"lpips_{recipe.stage1.lpips.net}"
        scores[name] = losses.lpips_term(lpips, x_hat, x, recipe.stage1.lpips.channels)
    if activity is not None:
        scores["weighted_mse"] = losses.weighted_mse_term(x_hat, x, activity)
    return scores


def _of_the_elbo(
    vae: Any, posterior: Any, logits: torch.Tensor | None, x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The two parts of the ELBO, in nats per image."""
    scores = {}
    if logits is not None:
        scores["bce"] = losses.bce_term(logits, x) * x[0].numel()
    if not vae.deterministic:
        nats = kl_per_dimension(posterior.mean, posterior.logvar)
        scores["kl"] = nats.mean() * posterior.mean[0].numel()
    return scores


def perceptual(recipe: Recipe, grey_levels: bool, device: torch.device) -> Perceptual | None:
    """The recipe's LPIPS network; None if it does not fit the images or, with a note, lacks its weights."""
    no_colours = recipe.data.channels == 4 and not grey_levels and recipe.stage1.lpips.channels == "repeat"
    if no_colours or any(recipe.lpips_contradictions()):
        return None
    try:
        return load_lpips(recipe.stage1.lpips.net, recipe.stage1.lpips.weights, device)
    except InputError as error:
        say(f"note: no LPIPS ({error})")
        return None
