"""Large sets, made for this and thrown away: how long each command needs before its first step.

`python -m tests.benchmarks.scale [--latents N ...] [--images N] [--evaluated N]` prints a table.
Latents are of 4x2x2, so that ten million are 0.6 GB; each of their figures is of a process of its own, in
which at most 256 files may be open.
What is read was just written, so it comes from memory: a cold disk adds the time that it takes to read it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from shared.data import latents, shard
from tests.conftest import ENCODE, ROOT, TINY, TRAIN1, TRAIN2, clean_environment

SHAPE = (4, 2, 2)
TIMED = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
from shared.data import latents
folder = Path(sys.argv[1])
started = time.perf_counter()
"""
DONE = "\nprint(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
WAYS = {
    "for samples": "latents.open_cache(folder)",
    "for training": "latents.verify(folder); part = latents.open_cache(folder).split('train')",
    "a batch of 128": "import numpy as np; part = latents.open_cache(folder).split('train')\n"
    "started = time.perf_counter()\n"
    "part.__getitems__(np.random.default_rng(0).integers(0, len(part), 128))",
}


def write_latents(folder: Path, count: int, vae: Path) -> float:
    """A cache of random moments and ten classes; returns the seconds of its summaries and manifest."""
    plan = latents.planned(folder, {"train": count, "val": 1000})
    moments = torch.randn(latents.SHARD, 2 * SHAPE[0], *SHAPE[1:])
    labels = torch.arange(latents.SHARD) % 10
    spent = 0.0
    summaries = {}
    for path, rows in (entry for entries in plan.values() for entry in entries):
        shard.write(path, moments[: len(rows)], labels[: len(rows)])
        started = time.perf_counter()
        summaries[path] = shard.summarise(path)
        spent += time.perf_counter() - started
    started = time.perf_counter()
    latents.finish(folder, vae, False, [str(label) for label in range(10)], plan, summaries)
    return spent + time.perf_counter() - started


def timed(way: str, folder: Path) -> str:
    """Seconds and MiB of a process that opens a cache in a way."""
    code = TIMED + WAYS[way] + DONE
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    seconds, memory = done.stdout.split()
    return f"{float(seconds):.3g} s, {memory} MiB"


def of_latents(count: int, place: Path, vae: Path) -> None:
    folder = place / f"latents{count}"
    spent = write_latents(folder, count, vae)
    print(f"| {count:,} latents: statistics, checksums and manifest | {spent:.3g} s |")
    for way, note in (("for samples", ""), ("for training", ", again"), ("a batch of 128", "")):
        if way == "for training":
            (folder / latents.VERIFIED).unlink()
            print(f"| {count:,} latents, opened {way}, of which nothing is known | {timed(way, folder)} |")
        print(f"| {count:,} latents, {way}{note} | {timed(way, folder)} |", flush=True)


def of_images(count: int, place: Path) -> None:
    """A folder of small PNG files in a hundred classes: from the command to the end of its only step."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = place / "images" / f"class{number % 100:02d}" / f"{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    data = {"source": str(place / "images"), "channels": 3, "image_size": 16}
    recipe = TINY | {"data": data, "stage1": TINY["stage1"] | {"max_steps": 1}, "run_dir": str(place / "run")}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for note in ("first time", "again"):
        started = time.perf_counter()
        environment = clean_environment(HF_HOME=str(place / "huggingface"))
        command = [sys.executable, TRAIN1, "--config", place / "recipe.yaml", f"run_dir={place / note}"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        print(f"| {count:,} PNG files, one step and its checkpoint, {note} | {seconds:.3g} s |")


def of_evaluation(count: int, place: Path) -> None:
    """As many samples against as many held-out JPEG files of 256 px, by networks that take little time."""
    rng = np.random.default_rng(0)
    (place / "photos").mkdir()
    for number in range(2 * count):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256)).save(place / "photos" / f"{number:06d}.jpg")
    data = {"source": str(place / "photos"), "channels": 3, "image_size": 256, "val_fraction": 0.5}
    model = TINY["stage1"]["model"] | {"channels": [8, 8, 16, 16], "latent_shape": [4, 16, 16]}
    stages = {"stage1": TINY["stage1"] | {"max_steps": 1, "model": model}}
    stages["stage2"] = TINY["stage2"] | {"max_steps": 1}
    path = place / "evaluated.yaml"
    path.write_text(yaml.safe_dump(TINY | stages | {"data": data, "run_dir": str(place / "evaluated")}))
    environment = clean_environment(HF_HOME=str(place / "huggingface"))
    for step in (
        [TRAIN1, "--config", path],
        [ENCODE, "--run", place / "evaluated"],
        [TRAIN2, "--config", path],
    ):
        subprocess.run([sys.executable, *step], env=environment, check=True, capture_output=True)
    command = ["-m", "shared.evaluate", "--run", place / "evaluated", "--num-images", str(count)]
    environment["OMP_NUM_THREADS"] = str(os.cpu_count())
    started = time.perf_counter()
    evaluating = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(evaluating.pid, 0)
    assert status == 0
    seconds = time.perf_counter() - started
    print(
        f"| {count:,} samples and images of 256 px, evaluate | {seconds:.3g} s, {used.ru_maxrss >> 10} MiB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--evaluated", type=int, default=10_000)
    options = parser.parse_args()
    print("| what | measured |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        vae = Path(place) / "of"
        for name in ("vae", "value_transform"):
            (vae / name).mkdir(parents=True)
            (vae / name / "config.json").write_text("{}\n")
        for count in options.latents:
            of_latents(count, Path(place), vae)
        if options.images:
            of_images(options.images, Path(place))
        if options.evaluated:
            of_evaluation(options.evaluated, Path(place))


if __name__ == "__main__":
    main()
