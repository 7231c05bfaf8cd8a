"""Ways to restore held-out photographs of a trained run: `python -m tests.benchmarks.restoration --run RUN`.

Three measurements without noise: means of 4 x 4 pixels, a Gaussian blur of 2 pixels, the left half alone. Of
each way PSNR and LPIPS of the restored images, how far they are from agreeing with what was measured, and how
often the denoiser was asked. Our own way stands in shared/sampling/restoring.py; the others are here.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from shared import config, trained
from shared.measure import images
from shared.run import open_run
from shared.sampling import restoring
from shared.sampling.editing import denoised, levels
from shared.sampling.transforms import LatentCodec
from shared.training.similarity import load_lpips, psnr

IMAGES = 8
RATE, WEIGHT = 0.1, 0.01  # of the latents alone
STEPS, ZETA = 100, 0.3  # of diffusion posterior sampling


def plain(pipe, y, operator, size):
    """What a picture program does: bicubic enlargement; what is not measured is left as it is."""
    return F.interpolate(y, size=size, mode="bicubic"), 0


def latents_alone(pipe, y, operator, size):
    """The latents whose image agrees best, near zero and without a denoiser: 300 steps of Adam."""
    codec = LatentCodec(**pipe.config.codec)
    z = torch.zeros(len(y), *pipe.latent_shape, requires_grad=True)
    adam = torch.optim.Adam([z], lr=RATE)
    for _ in range(300):
        x = pipe.vae.decode(codec.decode(z)).sample
        error = (operator(x) - y).square().sum() + WEIGHT * z.square().sum()
        adam.zero_grad()
        error.backward(inputs=[z])
        adam.step()
    return pipe.decode_latents(codec.decode(z.detach())), 0


def posterior_sampling(pipe, y, operator, size):
    """Diffusion posterior sampling (Chung et al. 2023, arXiv:2209.14687, algorithm 1) through the decoder."""
    codec, scheduler = LatentCodec(**pipe.config.codec), pipe.scheduler
    predict = pipe.predictor(len(y), None, 1.0)
    z = pipe.noises(0, len(y))
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    for t, after in zip(times, times[1:], strict=False):
        alpha, sigma = levels(scheduler, after)
        z.requires_grad_()
        clean, rest = denoised(scheduler, z, t, predict)
        error = (operator(pipe.vae.decode(codec.decode(clean)).sample) - y).flatten(1).norm(dim=1).sum()
        (slope,) = torch.autograd.grad(error, z)
        z = (alpha * clean + sigma * rest - ZETA * slope).detach()
    return pipe.decode_latents(codec.decode(z)), STEPS


def ours(steps: int) -> Callable:
    def restored(pipe, y, operator, size):
        out = pipe(
            image=y / 2 + 0.5, operator=operator, seed=0, num_inference_steps=steps, guidance_scale=1.0
        )
        return out.pixels, steps

    return restored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--ways", nargs="*", help="some of the ways, by name")
    options = parser.parse_args()
    run, recipe = open_run(options.run)
    pipe = trained.open_pipeline(run.path)
    pipe.set_progress_bar_config(disable=True)
    _, transform, _ = trained.open_vae(run, "cpu")
    _, held_out, _ = trained.open_images(run, recipe)
    x, _ = images.pixels(held_out, transform, IMAGES)
    lpips = load_lpips("alex", recipe.stage1.lpips.weights, torch.device("cpu"))
    half = torch.zeros(x.shape[2:], dtype=torch.bool)
    half[:, : x.shape[3] // 2] = True
    measured = {
        "4x smaller": restoring.downsampled(4),
        "blur of 2 px": restoring.blurred(2.0),
        "left half": restoring.seen(half),
    }
    ways = {
        "bicubic": plain,
        "latents alone": latents_alone,
        "DPS": posterior_sampling,
        "ours, 5 steps": ours(5),
        "ours, 10 steps": ours(10),
    }
    x_hat = images.decode(pipe.vae, images.encode(pipe.vae, x, "cpu")[0], "cpu")
    print("| measured | way | denoiser asked | PSNR (dB) | LPIPS | disagreement (RMS) | seconds |")
    print("|---|---|---|---|---|---|---|")
    print(row("all of it", "the VAE's reconstruction", 0, x_hat, x, lpips, 0.0, 0.0), flush=True)
    for name, operator in measured.items():
        y = operator(x)
        for way, action in ways.items():
            if options.ways and way not in options.ways:
                continue
            begun = time.perf_counter()
            found, asked = action(pipe, y, operator, x.shape[2:])
            seconds = time.perf_counter() - begun
            off = (operator(found) - y).square().mean().sqrt().item()
            print(row(name, way, asked, found, x, lpips, off, seconds), flush=True)


def row(name, way, asked, found, x, lpips, off, seconds) -> str:
    found = found.detach().clamp(-1, 1)
    with torch.no_grad():
        far = lpips(found, x).mean().item()
    decibels = psnr(found, x).mean().item()
    return f"| {name} | {way} | {asked} | {decibels:.2f} | {far:.3f} | {off:.4f} | {seconds:.1f} |"


if __name__ == "__main__":
    config.run(main)
