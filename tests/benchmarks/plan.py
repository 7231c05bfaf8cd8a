"""Whether a plan keeps its minutes, and what comes out of it.

`python -m tests.benchmarks.plan SOURCE=MINUTES ... [--num-images N] [--out DIR]` has launch.sh plan and run
each source, one after another, and prints how long it took until the samples were there and what evaluate
finds. Each run and its log stay in DIR.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from shared.plan import run_name
from tests.conftest import ROOT


def seconds_to_samples(source: str, minutes: str, run: Path) -> float:
    """From the command to the grid of samples; what follows it, the doctor and the report, is not counted."""
    if run.exists():
        sys.exit(f"{run} is there already: its training would go on, in less time")
    begun = time.time()
    with open(run.with_name(f"{run.name}.log"), "w") as log:
        command = [ROOT / "launch.sh", source, "--minutes", minutes, f"run_dir={run}"]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    return (run / "samples" / "grid.png").stat().st_mtime - begun


def found(run: Path, count: int) -> str:
    """What evaluate finds, in words."""
    command = [sys.executable, "-m", "shared.evaluate", "--run", run, "--num-images", str(count)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    samples = metrics["samples"]
    parts = [
        f"{metrics['reconstruction']['psnr']:.1f} dB",
        f"KID {samples['kid']:.4f} +- {samples['kid_deviation']:.4f} by {metrics['extractor'].split(',')[0]}",
        f"precision {samples['precision']:.2f}, recall {samples['recall']:.2f}",
    ]
    for name, pair in metrics.get("statistics", {}).get("all", {}).items():
        if isinstance(pair.get("generated"), float):
            parts.append(f"{name} {pair['generated']:.3g} ({pair['real']:.3g})")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plans", nargs="+", metavar="SOURCE=MINUTES")
    parser.add_argument("--num-images", type=int, default=500, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/plans"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print("| source | minutes | taken | of the minutes | what came out |\n|---|---|---|---|---|", flush=True)
    for entry in options.plans:
        source, _, minutes = entry.rpartition("=")
        run = options.out.resolve() / f"{run_name(source)}-{minutes}"
        seconds = seconds_to_samples(source, minutes, run)
        whole, rest = divmod(round(seconds), 60)
        share = seconds / 60 / float(minutes)
        words = found(run, options.num_images)
        print(f"| {source} | {minutes} | {whole} min {rest} s | {share:.0%} | {words} |", flush=True)


if __name__ == "__main__":
    main()
