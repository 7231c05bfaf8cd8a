"""Measure a run's reconstructions: `python -m shared.evaluate --run RUN [--split NAME]`.

Prints a table and writes RUN/report/metrics.json. By default the images held out from training; --split names another
split of the source, taken whole. Every figure stands beside the number of images it was measured on.
"""

import json
from dataclasses import replace

from shared import config
from shared.data_config import inspect_source
from shared.recipe import open_run


def held_out(recipe, split: str | None):
    """The images to measure on, and what they are called."""
    from shared import data

    if split is None:
        return data.split(data.open_source(recipe.data), recipe.data)[1], f"held out of {recipe.data.split}"
    wanted = replace(recipe.data, split=split)
    inspect_source(wanted)
    return data.whole(data.open_source(wanted)), split


def measure(vae, transform, part, accelerator) -> dict[str, float]:
    """Means over the images of a split.

    mse, l1, psnr: of the decoded posterior mean. bce, kl: nats per image, summed over pixels and latents, with z drawn
    from the posterior: their sum is the negative ELBO where pixels are taken as probabilities.
    """
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm

    from shared.data import in_order
    from shared.keyed import generator
    from shared.metrics import psnr
    from stage1_vae.diagnostics import active_units
    from stage1_vae.kl import kl_per_dimension

    sums, means, key = {}, [], generator("evaluate", device=accelerator.device)
    with torch.inference_mode(), accelerator.autocast(), tqdm(total=len(part), unit="img", desc="measuring") as bar:
        for batch in in_order(part, range(len(part)), 64, accelerator):
            x = transform(batch["raw"].to(accelerator.device))
            posterior = vae.encode(x).latent_dist
            x_hat = vae.decode(posterior.mean).sample
            scores = {"mse": F.mse_loss(x_hat, x), "l1": F.l1_loss(x_hat, x), "psnr": psnr(x_hat, x).mean()}
            if vae.config.output_activation == "sigmoid":
                logits = vae.logits(posterior.sample(key)).float()
                scores["bce"] = F.binary_cross_entropy_with_logits(logits, (x + 1) / 2) * x[0].numel()
            if not vae.deterministic:
                scores["kl"] = kl_per_dimension(posterior.mean, posterior.logvar).mean() * posterior.mean[0].numel()
            for name, value in scores.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(x)
            means.append(posterior.mean)
            bar.update(len(x))
    return {name: value / len(part) for name, value in sums.items()} | {"active_units": active_units(torch.cat(means))}


def main() -> None:
    parser = config.Parser(prog="python -m shared.evaluate", description="Measure a run's reconstructions.")
    parser.add_argument("--run", help="a run folder (the newest by default)")
    parser.add_argument("--split", help="a split of the source, such as test (by default what was held out from training)")
    options = parser.parse_args()
    run, recipe = open_run(options.run)
    from shared import checkpoint
    from shared.engine import make_accelerator
    from shared.transforms import ValueTransform
    from stage1_vae.model import DeepVAE

    newest = checkpoint.required(run / "stage1_vae" / "checkpoints")
    accelerator = make_accelerator(recipe.stage1)
    part, name = held_out(recipe, options.split)
    vae = checkpoint.load_module(DeepVAE, newest / "vae").to(accelerator.device).eval()
    scores = measure(vae, ValueTransform.from_pretrained(newest / "value_transform"), part, accelerator)
    config.say(f"{run.name}, {len(part):,} images ({name}), {newest.name}")
    for key, value in scores.items():
        config.say(f"  {key:<13}{value:.4g}")
    (run / "report").mkdir(exist_ok=True)
    written = {"images": len(part), "split": name, "checkpoint": newest.name, "reconstruction": scores}
    (run / "report" / "metrics.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    config.run(main)
