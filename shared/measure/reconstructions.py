"""Reconstructions against their images."""

from shared import config
from shared.config import InputError


def reconstruct(recipe, vae, transform, part, accelerator) -> dict[str, dict]:
    """Means over the images of a split.

    mse ... lpips: of the decoded posterior mean. bce, kl: nats per image, summed over pixels and latents, with z drawn
    from the posterior: their sum is the negative ELBO where pixels are taken as probabilities. mean_image_...: of the best
    image that is the same for all.
    """
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm

    from shared.data.batches import in_order
    from shared.training.keyed import generator
    from stage1_vae import diagnostics, losses
    from stage1_vae.kl import kl_per_dimension
    from stage1_vae.similarity import psnr, ssim

    activity = recipe.stage1.activity_weight if recipe.stage1.loss_weights.weighted_mse else None
    sums, means, spread, key = {}, [], diagnostics.Spread(activity), generator("evaluate", device=accelerator.device)
    lpips = perceptual(recipe, accelerator.device)
    with torch.inference_mode(), tqdm(total=len(part), unit="img", desc="reconstructions") as bar:
        for batch in in_order(part, range(len(part)), 64, accelerator):
            x = transform(batch["raw"].to(accelerator.device))
            with accelerator.autocast():
                posterior = vae.encode(x).latent_dist
                x_hat = vae.decode(posterior.mean).sample
                logits = vae.logits(posterior.sample(key)).float() if vae.config.output_activation == "sigmoid" else None
            scores = {"l1": F.l1_loss(x_hat, x), "psnr": psnr(x_hat, x).mean(), "ssim": ssim(x_hat, x).mean()}
            if x.shape[-1] >= losses.WINDOW:
                scores["ms_ssim"] = 1 - losses.ms_ssim_term(x_hat, x)
            if lpips:
                scores[f"lpips_{recipe.stage1.lpips.net}"] = losses.lpips_term(lpips, x_hat, x, recipe.stage1.lpips.channels)
            if activity is not None:
                scores["weighted_mse"] = losses.weighted_mse_term(x_hat, x, activity)
            if logits is not None:
                scores["bce"] = F.binary_cross_entropy_with_logits(logits, (x + 1) / 2) * x[0].numel()
            if not vae.deterministic:
                scores["kl"] = kl_per_dimension(posterior.mean, posterior.logvar).mean() * posterior.mean[0].numel()
            for name, value in scores.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(x)
            means.append(posterior.mean)
            spread.add(x, x_hat)
            bar.update(len(x))
    found = {name: value / len(part) for name, value in sums.items()} | {n: v.item() for n, v in spread.numbers().items()}
    return {"reconstruction": found | {"active_units": diagnostics.active_units(torch.cat(means))}}


def perceptual(recipe, device):
    """The LPIPS network of the recipe; None, with a word, where its weights cannot be had or do not fit the images."""
    from stage1_vae.similarity import load_lpips

    if any(recipe.lpips_contradictions()):
        return None
    try:
        return load_lpips(recipe.stage1.lpips.net, recipe.stage1.lpips.weights, device)
    except InputError as error:
        config.say(f"note: no LPIPS ({error})")
        return None
