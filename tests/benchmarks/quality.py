"""Whose samples are better after the same time on the same machine? FID and KID of ours and of the peers, in
one go.

`python -m tests.benchmarks.quality --data DIR --minutes 10`: Fashion-MNIST at 32 px from DIR, one contestant
after another, each in a process of its own, `--minutes` for everything that it trains; LATENT_STACK_WEIGHTS
names the folder of the Inception. Writes results.json, results.md and a picture of everybody's samples. The
peers: pip install 'latent-stack[benchmarks]'.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "fashion_mnist.yaml"
QUIET = [f"stage{n}.{what}_every=100000" for n in (1, 2) for what in ("save", "validate", "preview")]
SHARE = 0.22  # of our time that stage 1 takes
MARGIN = 0.95  # of the budget is planned with: long trainings are a little slower than short ones
BATCH = 100  # images sampled at once
PROBES = (20, 200)  # steps of two short trainings, from which the pace is reckoned


def images(folder: str, split: str) -> torch.Tensor:
    """Fashion-MNIST as everybody sees it: pixels (N,1,32,32) in [-1, 1]."""
    from shared.data import sources, splits
    from shared.data.config import DataConfig

    source = sources.open_source(
        DataConfig(source=folder, split=split, image_size=32, channels=1, resize="pad")
    )
    rows = splits.whole(source)
    raw = torch.cat(
        [
            rows.__getitems__(list(range(i, min(i + 1000, len(rows)))))["raw"]
            for i in range(0, len(rows), 1000)
        ]
    )
    return raw.float() / 127.5 - 1


# ---------------------------------------------------------------- contestants, each in a process of its own


def timed(sample, count: int, steps: int, batch: int) -> tuple[torch.Tensor, float]:
    """Samples (count,1,32,32), and images per second."""
    begun = time.monotonic()
    parts = [sample(min(batch, count - i), steps).float().clamp(-1, 1).cpu() for i in range(0, count, batch)]
    return torch.cat(parts), count / (time.monotonic() - begun)


def peer(name: str, options, out: Path) -> None:
    from tests.benchmarks.peers import PEERS

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, begun = images(options.data, "train"), time.monotonic()
    sample, steps, parameters = PEERS[name](x, options.minutes * 60, device)
    seconds = time.monotonic() - begun
    samples, rate = timed(sample, options.peer_images, 50, BATCH)
    _, default_rate = timed(sample, 10, 1000, 10) if name != "denoising_diffusion_pytorch" else (None, rate)
    save(
        out,
        samples,
        {
            "seconds": seconds,
            "steps": steps,
            "parameters": parameters,
            "images/s at 50": rate,
            "images/s": default_rate,
        },
    )


def save(out: Path, samples: torch.Tensor, numbers: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "features.npy").unlink(missing_ok=True)  # of other samples
    np.save(out / "samples.npy", ((samples + 1) * 127.5).round().byte().numpy())
    (out / "numbers.json").write_text(json.dumps(numbers) + "\n")


def command(*arguments) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def pace_of(stage: str, config: list[str], run: Path) -> tuple[float, float]:
    """Seconds per step of a stage on this machine, and those that its start and its end take."""
    times = []
    for steps in PROBES:
        begun = time.monotonic()
        command(
            ROOT / stage / "train.py",
            "--config",
            RECIPE,
            *config,
            f"run_dir={run}-{steps}",
            f"{stage[:6]}.max_steps={steps}",
        )
        times.append(time.monotonic() - begun)
    pace = (times[1] - times[0]) / (PROBES[1] - PROBES[0])
    return pace, max(0.0, times[0] - PROBES[0] * pace)


def ours(options, out: Path) -> None:
    """Both stages by their own commands; how many steps the budget holds is measured beforehand."""
    run, budget = out / "run", options.minutes * 60
    config = [f"data.source={options.data}", *QUIET, *options.override]
    if not (run / "pipeline").is_dir():
        pace, rest = pace_of("stage1_vae", config, out / "pace1")
        steps1 = max(1, int((budget * SHARE - rest) / pace))
        begun = time.monotonic()
        command(
            ROOT / "stage1_vae/train.py",
            "--config",
            RECIPE,
            *config,
            f"run_dir={run}",
            f"stage1.max_steps={steps1}",
        )
        command(ROOT / "stage1_vae/encode.py", "--run", run)
        spent = time.monotonic() - begun
        latents = [*config, f"stage2.latents={run}/latents"]
        pace, rest = pace_of("stage2_diffusion", latents, out / "pace2")
        steps2 = max(1, int((MARGIN * budget - spent - rest) / pace))
        begun = time.monotonic()
        length = [f"stage1.max_steps={steps1}", f"stage2.max_steps={steps2}"]
        command(ROOT / "stage2_diffusion/train.py", "--config", RECIPE, *config, f"run_dir={run}", *length)
        (out / "time.json").write_text(
            json.dumps({"seconds": spent + time.monotonic() - begun, "steps": steps1 + steps2})
        )
    draw_ours(run, options, json.loads((out / "time.json").read_text()), out.parent)


def evaluations(sampling, steps: int) -> int:
    """How often a network is asked for one image in a number of steps: twice within the interval of
    guidance."""
    low, high = sampling.guidance_interval
    return steps + (sampling.guidance_scale != 1) * sum(low <= 1 - i / steps <= high for i in range(steps))


def draw_ours(run: Path, options, numbers: dict, out: Path) -> None:
    """Samples at 50 network evaluations and at the recipe's number of steps, of the VAE's prior, and
    reconstructions of test images; in the precision of the training, as `python -m shared.evaluate` does."""
    from shared import trained
    from shared.measure.images import decode, encode
    from shared.run import open_run
    from shared.sampling.pipeline import LatentDiffusionPipeline
    from shared.training import processes

    _, recipe = open_run(run)
    autocast = processes.make_accelerator(recipe.stage2).autocast
    pipe, prior, default = (
        trained.open_pipeline(run),
        LatentDiffusionPipeline.from_vae(run / "latents"),
        recipe.sampling.num_steps,
    )
    fifty = max(steps for steps in range(1, 51) if evaluations(recipe.sampling, steps) <= 50)
    noise, labels = (
        pipe.noises(0, options.num_images),
        torch.arange(options.num_images) % len(pipe.config.classes),
    )
    numbers |= {"parameters": sum(p.numel() for m in (pipe.vae, pipe.unet) for p in m.parameters())}
    for name, each, steps in (("ours_50", pipe, fifty), ("ours", pipe, default), ("ours_prior", prior, 1)):
        each.set_progress_bar_config(disable=True)
        rows = iter(torch.arange(options.num_images).split(BATCH))

        def sample(count: int, steps: int, each=each, rows=rows) -> torch.Tensor:
            mine = next(rows)
            with autocast():
                return each(noise[mine], labels[mine], recipe.sampling.guidance_scale, steps).pixels

        samples, rate = timed(sample, options.num_images, steps, BATCH)
        rates = {"images/s at 50" if steps == fifty else "images/s": rate}
        save(out / name, samples, numbers | rates | {"evaluations": evaluations(recipe.sampling, steps)})
    x = images(options.data, "test")[: options.num_images]
    mean, _ = encode(pipe.vae, x, "cpu")
    save(out / "ours_reconstructions", decode(pipe.vae, mean, "cpu"), {})


# ---------------------------------------------------------------- everybody


def features_of(x: torch.Tensor, extractor, path: Path) -> torch.Tensor:
    """Inception features (N,2048) of pixels (N,1,32,32), in bfloat16 for everybody alike: twice as fast on a
    CPU that has it."""
    from tqdm import tqdm

    if not path.is_file():
        device = next(extractor.network.parameters()).device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            parts = [
                extractor.network(part.to(device))[0].float().cpu()
                for part in tqdm(x.split(64), desc=path.parent.name)
            ]
        np.save(path, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(path))


def measure(options) -> dict:
    """FID and KID of everybody's samples against the 10,000 test images, by the same Inception and as many
    images each; FID of all images, too, where there are more."""
    from shared.measure import features

    extractor = features.inception(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    real = (features_of(images(options.data, "test"), extractor, options.out / "real.npy"), None)
    if not (options.out / "real_training").is_dir():
        save(options.out / "real_training", images(options.data, "train")[: options.num_images], {})
    table = {}
    for folder in sorted(p.parent for p in options.out.glob("*/samples.npy")):
        x = torch.from_numpy(np.load(folder / "samples.npy")).float() / 127.5 - 1
        found = features_of(x, extractor, folder / "features.npy")
        row = features.distances((found[: options.peer_images], None), real)
        if len(found) > options.peer_images:
            row["fid of all"] = features.fid((found, None), real)
        table[folder.name] = json.loads((folder / "numbers.json").read_text()) | row
    return table


def report(table: dict, options) -> None:
    fids = [f"FID (N={count:,})" for count in (options.peer_images, options.num_images)]
    head = [
        "",
        *fids,
        "KID",
        "precision",
        "recall",
        "images/s at 50 steps",
        "images/s",
        "steps",
        "parameters",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    def cell(value, form="{:.1f}"):
        return "" if value is None else form.format(value)

    for name, row in sorted(table.items(), key=lambda item: item[1]["fid"]):
        size = cell(row.get("parameters") and row["parameters"] / 1e6, "{:.1f} M")
        lines.append(
            f"| {name} | {row['fid']:.1f} | {cell(row.get('fid of all'))} | {row['kid']:.4f} "
            f"| {row['precision']:.2f} | {row['recall']:.2f} "
            f"| {cell(row.get('images/s at 50'))} | {cell(row.get('images/s'))} "
            f"| {cell(row.get('steps'), '{:,}')} | {size} |"
        )
    (options.out / "results.md").write_text("\n".join(lines) + "\n")
    (options.out / "results.json").write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(lines))
    draw(
        [name for name in ("real_training", "ours", *options.only, "ours_prior") if name in table],
        options.out,
    )


def draw(names: list[str], out: Path) -> None:
    """Sixty images of each, side by side."""
    from PIL import Image, ImageDraw

    from shared.show import grids

    panels = []
    for name in dict.fromkeys(names):
        x = torch.from_numpy(np.load(out / name / "samples.npy")[:60]).float() / 127.5 - 1
        grid = grids.grid(x, 10)
        panel = Image.new("RGB", (grid.width, grid.height + 16), "white")
        panel.paste(grid, (0, 16))
        ImageDraw.Draw(panel).text((2, 2), name, fill="black")
        panels.append(panel)
    width, height = panels[0].size
    picture = Image.new("RGB", (2 * width, -(-len(panels) // 2) * height), "white")
    for index, panel in enumerate(panels):
        picture.paste(panel, (index % 2 * width, index // 2 * height))
    picture.convert("L").save(out / "samples.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", required=True, help="a folder with Fashion-MNIST as parquet, splits train and test"
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument(
        "--peer-images", type=int, default=1000, help="as many of everybody's images are compared"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--only", nargs="*", default=["ours", "diffusers_ddpm", "denoising_diffusion_pytorch", "monai"]
    )
    parser.add_argument("--override", nargs="*", default=[], help="changes to our recipe")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.contestant:
        out = options.out / options.contestant
        return ours(options, out) if options.contestant == "ours" else peer(options.contestant, options, out)
    for name in options.only:
        if not (options.out / name / "samples.npy").is_file():
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            command("-m", "tests.benchmarks.quality", *sys.argv[1:], "--contestant", name)
    report(measure(options), options)
    return None


if __name__ == "__main__":
    main()
