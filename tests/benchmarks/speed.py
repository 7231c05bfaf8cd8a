"""Where the time goes: ratios on this machine, and what they are held against. Steps alternate; processes run
one by one.

`python -m tests.benchmarks.speed [--only fit lpips ...] [--out DIR]`; LATENT_STACK_WEIGHTS names the folder
of LPIPS' weights. Needs an idle machine. Prints a table and writes speed.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from shared import recipe, trained
from shared.data import latents, shard
from shared.data.config import DataConfig
from shared.data.sources import open_source
from shared.data.splits import Pixels, split
from shared.recipe import Recipe
from shared.run import RunFolder, StageFolder
from shared.training import engine, optim, processes
from shared.training.similarity import load_lpips, psnr
from stage1_vae.encoding import encode_rows
from stage1_vae.model import DeepVAE
from stage1_vae.pretrained import make_vae
from stage2_diffusion.unet import make_unet
from tests.benchmarks.step_memory import make_stage

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable]
QUIET = ["save_every=100000", "validate_every=100000", "preview_every=100000"]


def load(config: str, *overrides: str) -> Recipe:
    return recipe.load(ROOT / "configs" / config, list(overrides), needs_images=False)


def alternate(seconds: float, **steps) -> dict[str, float]:
    """The median time in seconds of each of several functions, called in turn until `seconds` have gone
    by."""
    times = {name: [] for name in steps}
    for step in steps.values():
        step()
    begun = time.monotonic()
    while time.monotonic() - begun < seconds or any(len(each) < 3 for each in times.values()):
        for name, step in steps.items():
            at = time.monotonic()
            step()
            times[name].append(time.monotonic() - at)
    return {name: statistics.median(each) for name, each in times.items()}


# ---------------------------------------------------------------- the loop


class Watched:
    """An iterator that adds up the time spent in waiting for it."""

    def __init__(self, items):
        self.items, self.seconds = items, []

    def __next__(self):
        at = time.monotonic()
        item = next(self.items)
        self.seconds.append(time.monotonic() - at)
        return item


def bare_vae_step(stage, x):
    """What a hand-written loop would do: the same network, terms and AdamW, and nothing else."""
    vae, config = stage.models["vae"], stage.config
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.optim.lr, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )

    def step():
        batch = x[torch.randint(len(x), (config.batch_size,))].float() / 127.5 - 1
        with stage.accelerator.autocast():
            logits, mean, logvar = vae(batch, noise=torch.randn(len(batch), *config.model.latent_shape))
            x_hat = vae.activate(logits)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = F.l1_loss(x_hat, batch) + F.mse_loss(x_hat, batch) + 0.002 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(vae)

    return step


def bare_unet_step(stage):
    unet, config = stage.models["unet"], stage.config
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.optim.lr, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    rows = stage.data.__getitems__(range(len(stage.data)))

    def step():
        some = torch.randint(len(stage.data), (config.batch_size,))
        z = stage.codec.sample(rows["moments"][some], torch.randn(len(some), *stage.data.shape))
        labels = torch.where(torch.rand(len(some)) < 0.1, len(stage.classes), rows["label"][some])
        t, noise = torch.sigmoid(torch.randn(len(some))), torch.randn_like(z)
        at = t.view(-1, 1, 1, 1)
        with stage.accelerator.autocast():
            prediction = unet((1 - at) * z + at * noise, 1000 * t, class_labels=labels, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise - z).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(unet)

    return step


def fit_against_bare(stage, config, bare, folder: Path, name: str, steps: int = 100):
    """A step of fit() and one of a bare loop in turn, the same network in both; and what fit() waits for
    data."""
    watched, mine, theirs, begun = [], [], [], []
    batches, train_step = engine.batches, stage.train_step

    def waiting(*arguments):
        watched.append(Watched(batches(*arguments)))
        return watched[-1]

    def one_each(*arguments):
        at = time.monotonic()
        mine.extend(at - before for before in begun[-1:])
        bare()
        begun.append(time.monotonic())
        theirs.append(begun[-1] - at)
        return train_step(*arguments)

    engine.batches, stage.train_step = waiting, one_each
    try:
        engine.fit(stage, StageFolder(folder / name), config, steps, 0, stage.accelerator)
    finally:
        engine.batches, stage.train_step = batches, train_step
    ratio = statistics.median(a / b for a, b in list(zip(mine, theirs, strict=False))[5:])
    step, wait = statistics.median(mine), statistics.median(watched[0].seconds[5:])
    yield f"{name}: fit() against a bare loop, time per step", ratio, f"{step * 1e3:.0f} ms", "<= 1.03"
    yield f"{name}: waiting for data, of a step", wait / step, f"{wait * 1e3:.2f} ms", "<= 0.01"


def fit(folder: Path):
    run = folder / "digits"
    common = [
        f"run_dir={run}",
        *(f"stage{n}.{key}" for n in (1, 2) for key in QUIET),
        "stage1.optim.name=adamw",
        "stage1.optim.lr=1e-3",
    ]
    small = load("digits.yaml", *common, "stage1.max_steps=100", "stage2.max_steps=100")
    stage = make_stage(small, folder / "nothing")[0]
    x = stage.data.__getitems__(list(range(len(stage.data))))["raw"]
    yield from fit_against_bare(stage, small.stage1, bare_vae_step(stage, x), folder, "stage 1, digits")
    train(run, common)
    stage, _ = make_stage(small, run)
    yield from fit_against_bare(stage, small.stage2, bare_unet_step(stage), folder, "stage 2, digits")


def train(run: Path, overrides: list[str]) -> None:
    """A run of the digits with few steps, by its own commands, for what needs a finished one."""
    command = ["--config", "configs/digits.yaml", *overrides, "stage1.max_steps=20", "stage2.max_steps=20"]
    for step in (
        ["stage1_vae/train.py", *command],
        ["stage1_vae/encode.py", "--run", str(run)],
        ["stage2_diffusion/train.py", *command],
    ):
        subprocess.run([*PYTHON, *step], cwd=ROOT, check=True, capture_output=True)


def digits_run(folder: Path) -> Path:
    """The finished run of the digits that several sections share."""
    run = folder / "digits"
    if not (run / "pipeline").is_dir():
        train(run, [f"run_dir={run}"])
    return run


# ---------------------------------------------------------------- stage 1


def plain_loop(model, optimizer, forward, x, precision=torch.float32):
    """A training step of L1 + KL in the given precision."""

    def step():
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            x_hat, mean, logvar = forward(model, x)
        loss = (
            F.l1_loss(x_hat.float(), x)
            + 1e-4 * 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).mean()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours_forward(vae, x):
    logits, mean, logvar = vae(x, noise=torch.randn(len(x), *vae.config.latent_shape))
    return vae.activate(logits), mean, logvar


def theirs_forward(vae, x):
    posterior = vae.encode(x).latent_dist
    return vae.decode(posterior.sample()).sample, posterior.mean, posterior.logvar


def models_at_128():
    """Ours as in deep_vae_128.yaml, and an AutoencoderKL of about as many parameters and the same dz,
    8x8x8."""
    from diffusers import AutoencoderKL

    ours = DeepVAE(3, 128, **load("deep_vae_128.yaml").stage1.model.network)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    widths = (48, 96, 128, 160, 192)
    return ours, AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=8, norm_num_groups=16, **blocks
    )


def autoencoderkl(folder: Path, batch_size: int = 16):
    ours, theirs = models_at_128()
    x = torch.rand(batch_size, 3, 128, 128) * 2 - 1
    adam, plain = (partial(torch.optim.AdamW, lr=1e-4, fused=fused) for fused in (True, False))
    times = alternate(
        60,
        ours=plain_loop(ours, adam(ours.parameters()), ours_forward, x, torch.bfloat16),
        theirs=plain_loop(theirs, plain(theirs.parameters()), theirs_forward, x),
        theirs_bf16=plain_loop(theirs, plain(theirs.parameters()), theirs_forward, x, torch.bfloat16),
    )
    rates = {name: batch_size / seconds for name, seconds in times.items()}
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours, theirs)]
    figures = (
        f"{rates['ours']:.1f} against {rates['theirs']:.1f} images/s; "
        f"{sizes[0]:.1f} and {sizes[1]:.1f} M parameters"
    )
    yield (
        "stage 1 at 128 px: images/s against AutoencoderKL in fp32",
        rates["ours"] / rates["theirs"],
        figures,
        ">= 8",
    )
    yield (
        "... against AutoencoderKL in bf16",
        rates["ours"] / rates["theirs_bf16"],
        f"{rates['theirs_bf16']:.1f} images/s",
        "",
    )


def lpips(folder: Path, batch_size: int = 16):
    """The share of LPIPS in a step of deep_vae_128, for each backbone, and for VGG on a square of 64 px."""
    vae, _ = models_at_128()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, fused=True)
    x = torch.rand(batch_size, 3, 128, 128) * 2 - 1

    def step(network=None):
        with torch.autocast("cpu", torch.bfloat16):
            x_hat, mean, logvar = ours_forward(vae, x)
            loss = F.l1_loss(x_hat, x) + 0.02 * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = loss + network(x_hat, x).mean() if network else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    networks = {net: load_lpips(net, None, "cpu") for net in ("vgg", "alex", "squeeze")}
    networks["vgg, crop 64"] = lambda a, b: networks["vgg"](a[..., 32:96, 32:96], b[..., 32:96, 32:96])
    times = alternate(
        60, without=step, **{name: partial(step, network) for name, network in networks.items()}
    )
    for name in networks:
        yield (
            f"LPIPS ({name}), of a step at 128 px",
            1 - times["without"] / times[name],
            f"{times[name] * 1e3:.0f} ms",
            "<= 0.35",
        )


def quality_at_128(folder: Path, minutes: float = 3):
    """PSNR and LPIPS of held-out photos after the same wall time, ours against AutoencoderKL; needs
    LATENT_STACK_DATA."""
    source = Path(os.environ.get("LATENT_STACK_DATA", "/nowhere")) / "clothing128"
    if not source.is_dir():
        print(f"(no photos at {source}: left out)")
        return
    data = DataConfig(source=str(source), image_size=128, channels=3, resize="crop", val_fraction=0.05)
    training, held_out = split(open_source(data), data)
    judge = load_lpips("vgg", None, "cpu")

    def pixels(part: Pixels, rows) -> torch.Tensor:
        return part.__getitems__(list(rows))["raw"].float() / 127.5 - 1

    x = pixels(held_out, range(128))
    kinds = {"ours": (ours_forward, torch.bfloat16), "AutoencoderKL": (theirs_forward, torch.float32)}
    for (name, (forward, precision)), vae in zip(kinds.items(), models_at_128(), strict=True):
        optimizer, begun, steps = torch.optim.AdamW(vae.parameters(), lr=1e-4), time.monotonic(), 0
        while time.monotonic() - begun < 60 * minutes:
            batch = pixels(training, torch.randint(len(training), (16,)).tolist())
            plain_loop(vae, optimizer, forward, batch, precision)()
            steps += 1
        with torch.inference_mode():
            parts = [
                vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in x.split(16)
            ]
            distances = [judge(a, b).flatten() for a, b in zip(parts, x.split(16), strict=True)]
        figures = f"LPIPS {torch.cat(distances).mean().item():.3f}, {steps} steps"
        yield (
            f"{name}: PSNR of held-out photos after {minutes:g} minutes",
            psnr(torch.cat(parts), x).mean().item(),
            figures,
            "",
        )


# ---------------------------------------------------------------- latents, samples, start-up


def encoding(folder: Path):
    small = load("fashion_mnist.yaml")
    vae = DeepVAE(1, 32, **small.stage1.model.network).eval()
    accelerator = processes.make_accelerator(small.stage1)
    data = DataConfig(source="digits", image_size=32, channels=1)
    part, transform = split(open_source(data), data)[0], lambda raw: raw.float() / 127.5 - 1
    x = torch.rand(64, 1, 32, 32)

    class Silent:
        update = staticmethod(lambda count: None)

    def bare():
        with torch.inference_mode(), accelerator.autocast():
            for _ in range(16):
                vae.moments(x)

    times = alternate(
        20,
        ours=lambda: list(encode_rows(vae, transform, part, [range(1024)], accelerator, Silent)),
        bare=bare,
    )
    yield (
        "encoding: images/s against the bare encoder",
        times["bare"] / times["ours"],
        f"{1024 / times['ours']:.0f} images/s",
        ">= 0.9",
    )


def on_the_fly(folder: Path):
    """A step of stage 2 from saved latents against one that encodes its images first."""
    run = digits_run(folder)
    stage, config = make_stage(load("digits.yaml", f"run_dir={run}"), run)
    saved, x = bare_unet_step(stage), torch.rand(config.batch_size, 1, 32, 32)

    def encoded():
        with torch.inference_mode(), stage.accelerator.autocast():
            stage.decoder.vae.moments(x)
        saved()

    times = alternate(20, saved=saved, encoded=encoded)
    ratio = times["encoded"] / times["saved"]
    yield (
        "stage 2: a step that encodes its images against one from the cache",
        ratio,
        f"{times['saved'] * 1e3:.0f} ms",
        "",
    )


def sampling(folder: Path):
    run = digits_run(folder)
    pipe = trained.open_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(64) % 10
    for count in (1, 64):
        noise = pipe.noises(0, count)

        def sample(noise=noise, count=count):
            return pipe.decode_latents(pipe.sample(noise, labels[:count], 1.0, 20))

        seconds = alternate(10, sample=sample)["sample"]
        yield f"digits, 20 steps, {count} at once: images/s", count / seconds, f"{seconds * 1e3:.0f} ms", ""
    imports = [
        *PYTHON,
        "-c",
        "import os, torch; from diffusers import UNet2DModel, DiffusionPipeline; os._exit(0)",
    ]
    generate = [
        *PYTHON,
        "-m",
        "shared.generate",
        "--run",
        str(run),
        "--num-images",
        "1",
        "--out",
        str(folder / "one"),
    ]

    def run_it(command):
        return lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    times = alternate(
        30,
        imports=run_it(imports),
        one=run_it(generate),
        help=run_it([*PYTHON, "-m", "shared.generate", "--help"]),
    )
    yield (
        "generate of one image, cold to PNG, above the imports: seconds",
        times["one"] - times["imports"],
        f"{times['one']:.1f} s",
        "<= 2",
    )
    yield "--help: seconds", times["help"], "", "<= 0.5"


def memory(folder: Path, count: int = 10_000_000):
    """A cache of ten million synthetic latents of 2x1x1, opened and read."""
    cache = folder / "ten_million"
    moments = torch.randn(latents.SHARD, 4, 1, 1)
    for number in range(-(-count // latents.SHARD)):
        shard.write(latents.shard_path(cache, "train", number), moments, None)
    code = (
        "import json, resource, time, torch\nfrom pathlib import Path\nfrom shared.data import latents\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; at = time.monotonic()\n"
        f"data = latents.Latents(sorted(Path({str(cache)!r}).glob('train/*.safetensors')))\n"
        "first = data.__getitems__(torch.randint(len(data), (1024,)).tolist())\n"
        "seconds = time.monotonic() - at\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(json.dumps([len(data), seconds, grown / 1024]))"
    )
    found = subprocess.run([*PYTHON, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    images, seconds, more = json.loads(found.splitlines()[-1])
    yield (
        f"a cache of {images / 1e6:.0f} M latents: seconds to open and read 1,024",
        seconds,
        f"{more:.0f} MiB more",
        "seconds",
    )


def step_memory(folder: Path):
    """The peak of a training step of each stage against the sum of what it must hold."""
    run = digits_run(folder)
    at_128 = ["data.source=digits", "data.channels=1", "stage1.loss_weights.lpips=0", "stage1.batch_size=16"]
    trainings = {
        "stage 1, deep_vae_128 with grey images and without LPIPS": [
            folder / "nothing",
            "configs/deep_vae_128.yaml",
            *at_128,
        ],
        "stage 2, digits": [run, "configs/digits.yaml", f"run_dir={run}"],
    }
    for name, arguments in trainings.items():
        command = [*PYTHON, "-m", "tests.benchmarks.step_memory", *map(str, arguments)]
        found = json.loads(
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[
                -1
            ]
        )
        peak = found.pop("peak")
        figures = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in found.items())
        yield (
            f"{name}: peak memory against the sum of its parts",
            peak / sum(found.values()),
            f"{peak / 2**20:.0f} MiB; {figures}",
            "",
        )


# ---------------------------------------------------------------- processes


def pace(launcher: list[str], threads: str, run: str, *overrides: str) -> float:
    """Seconds per step of stage 1 of the digits: of a longer training what a shorter one did not take."""
    times = []
    for steps in (20, 120):
        config = [
            f"run_dir={run}{steps}",
            f"stage1.max_steps={steps}",
            *(f"stage1.{key}" for key in QUIET),
            *overrides,
        ]
        command = [*launcher, "stage1_vae/train.py", "--config", "configs/digits.yaml", *config]
        begun = time.monotonic()
        subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": threads}
        )
        times.append(time.monotonic() - begun)
    return (times[1] - times[0]) / 100


def muon(folder: Path):
    """An update of the matrices of photos_64's VAE and UNet by our Muon and by torch's."""
    recipe = load("photos_64.yaml")
    vae = make_vae(recipe.stage1.model, recipe.data)
    unet = make_unet(recipe.stage2.unet, tuple(recipe.stage1.model.latent_shape), 10)
    for name, model in (("VAE", vae), ("UNet", unet)):
        matrices = list(optim.hidden_matrices(model).values())
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        ours = optim.Muon(matrices, 1e-3, 0.01)
        theirs = torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")
        times = alternate(6, ours=ours.step, theirs=theirs.step)
        ratio = times["theirs"] / times["ours"]
        figures = f"{1e3 * times['ours']:.0f} ms against {1e3 * times['theirs']:.0f} ms"
        yield f"one update by Muon of the {name} of photos_64, torch's time over ours", ratio, figures, ""


def two_processes(folder: Path):
    """Two processes on two cores against one with two threads, stage 1 of the digits, with its Muon and with
    AdamW."""
    pair = [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    for name in ("muon", "adamw"):
        one = pace(PYTHON, "2", f"{folder}/{name}-one", f"stage1.optim.name={name}")
        two = pace(pair, "1", f"{folder}/{name}-two", f"stage1.optim.name={name}")
        weights = trained.open_vae(RunFolder(folder / f"{name}-one120"), "cpu")[0].num_parameters()
        sent = f"{weights * 4 / 2**20:.1f} MiB sent, and as many received"
        figures = f"{sent}, per step and process (gradients in fp32, a ring of two)"
        yield f"stage 1, {name}: two processes against one with two threads, steps/s", one / two, figures, ""


SECTIONS = {
    f.__name__: f
    for f in (
        fit,
        autoencoderkl,
        lpips,
        quality_at_128,
        encoding,
        on_the_fly,
        sampling,
        memory,
        step_memory,
        muon,
        two_processes,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    processes.settle_process()
    lines = ["| | measured | | asked |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            for what, value, figures, asked in SECTIONS[name](Path(folder)):
                lines.append(f"| {what} | {value:.3g} | {figures} | {asked} |")
                print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
