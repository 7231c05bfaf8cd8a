"""Measure a run: `python -m shared.evaluate --run RUN [--split NAME] [--num-images N] [--extractor auto|inception|own]`.

Reconstructions, samples, a memorisation meter and, where the recipe names a field, that field's own statistics. Prints a
table and writes RUN/report/metrics.json with pictures. Every figure stands beside the number of images and the extractor.
By default on the images held out from training; --split names another split of the source.
"""

import json

from shared import config
from shared.config import InputError
from shared.recipe import open_run


def reconstruct(recipe, vae, transform, part, accelerator) -> dict[str, dict]:
    """Means over the images of a split.

    mse ... lpips: of the decoded posterior mean. bce, kl: nats per image, summed over pixels and latents, with z drawn
    from the posterior: their sum is the negative ELBO where pixels are taken as probabilities. mean_image_...: of the best
    image that is the same for all.
    """
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm

    from shared.data import in_order
    from shared.keyed import generator
    from shared.metrics import psnr, ssim
    from stage1_vae import diagnostics, losses
    from stage1_vae.kl import kl_per_dimension

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
    from shared.metrics import load_lpips

    if any(recipe.lpips_contradictions()):
        return None
    try:
        return load_lpips(recipe.stage1.lpips.net, recipe.stage1.lpips.weights, device)
    except InputError as error:
        config.say(f"note: no LPIPS ({error})")
        return None


def judge(run, recipe, vae, transform, training, part, options, accelerator) -> dict:
    """Samples, reconstructions and training images against held-out ones."""
    from shared import data, features, trained

    device, sampling = accelerator.device, recipe.sampling
    pipe = trained.open_pipeline(run).to(device)
    seen, seen_labels = trained.pixels(training, transform, 10_000)
    x, labels = trained.pixels(part, transform, options.num_images)
    if min(len(x), len(seen)) < 4:
        raise InputError(f"data.val_fraction: {len(x)} held-out images say nothing about samples; at least 4 are needed (or --split NAME)")
    extractor = features.choose(options.extractor, trained.are_photographs(training), seen, seen_labels, device)
    classes = trained.labels_like(seen_labels, pipe.config.classes, options.num_images)
    noise = pipe.noises(options.seed, options.num_images)
    with accelerator.autocast():
        values, drawn = trained.sample(pipe, noise, classes, sampling.guidance_scale, sampling.num_steps, 64, accelerator)
        x_hat = trained.decode(vae, trained.encode(vae, x, device)[0], device)
    real = extractor.all(x, device, "held-out images")
    floor = seen[data.evenly(len(seen), len(drawn))]
    samples, seen_again, decoded = (
        extractor.all(images, device, words)
        for words, images in (("samples", drawn.float()), ("training images", floor), ("reconstructions", x_hat))
    )
    result = {
        "extractor": extractor.name, "real_images": len(x), "generated_images": len(drawn), "floor_images": len(floor),
        "samples": features.distances(samples, real), "rfid": features.fid(decoded, real),
        "training_against_held_out": features.distances(seen_again, real),
        "memorisation": memorisation(run, drawn.float(), x, training, transform, accelerator),
    }  # fmt: skip
    if recipe.data.field:
        result["statistics"] = statistics(run, recipe.data.field, values, classes, transform.inverse(x), labels, pipe.config.classes)
    return result


def memorisation(run, drawn, x, training, transform, accelerator) -> dict:
    """How near samples are to their nearest training image, beside how near held-out images are; draws the nearest pairs."""
    import torch

    from shared import data, features, pictures

    rows = data.evenly(len(training), 200_000)
    batches = data.in_order(training, rows, 256, accelerator)
    targets = torch.cat([features.shrunk(transform(batch["raw"])) for batch in batches])
    (distance, places), (usual, _) = (features.nearest(features.shrunk(images), targets) for images in (drawn, x))
    closest = distance.argsort()[:8]
    copied = transform(training.__getitems__([rows[place] for place in places[closest].tolist()])["raw"])
    pictures.grid(torch.cat([drawn[closest], copied]), len(closest)).save(run / "report" / "nearest.png")
    return {
        "training_images": len(rows), "samples_to_training": distance.median().item(), "held_out_to_training": usual.median().item(),
        "share_nearer_than_99_percent_of_held_out": (distance < usual.quantile(0.01)).float().mean().item(),
    }  # fmt: skip


def statistics(run, field: str, generated, classes, real, labels, names) -> dict:
    """The field's statistics of generated values (N,C,H,W) against real ones: of all, and of each class by itself."""
    from shared import domain, plots

    generated, real = generated.numpy(), real.numpy()
    tables = {"all": domain.compare(field, generated, real)}
    if classes is not None and labels is not None:
        for number, name in enumerate(names):
            ours, theirs = generated[classes == number], real[labels == number]
            if min(len(ours), len(theirs)) >= 4:
                tables[name] = domain.compare(field, ours, theirs)
    plots.statistics(field, generated, real).savefig(run / "report" / "statistics.png")
    return tables


def main() -> None:
    parser = config.Parser(prog="python -m shared.evaluate", description="Measure a run's reconstructions and samples.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument("--split", help="a split of the source, such as test (by default what was held out from training)")
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="samples to draw, and images to hold against them")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--extractor", choices=("auto", "inception", "own"), default="auto", help="what makes features of images")
    options = parser.parse_args()
    config.at_least(options, num_images=8, seed=0)
    run, recipe = open_run(options.run)
    from shared import trained
    from shared.engine import make_accelerator

    accelerator = make_accelerator(recipe.stage1)
    vae, transform, newest = trained.open_vae(run, accelerator.device)
    training, part, name = trained.open_images(recipe, options.split)
    (run / "report").mkdir(exist_ok=True)
    result = {"images": len(part), "split": name, "checkpoint": newest.name}
    config.say(f"{run.name}, {len(part):,} images ({name}), {newest.name}")
    measures = (
        lambda: reconstruct(recipe, vae, transform, part, accelerator),
        lambda: judge(run, recipe, vae, transform, training, part, options, accelerator),
    )
    for measure in measures:  # what was measured first stands on disk if the second cannot be
        found = measure()
        config.show(found)
        result |= found
        (run / "report" / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    config.run(main)
