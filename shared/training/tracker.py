"""The log of a run: metrics.jsonl always; wandb and tensorboard through Accelerate when the recipe asks.

Also what is logged of time and memory.
Values may be tensors on a device: they stay there and are fetched many steps at a time, so that logging every
step costs no wait. Each step is logged in metrics.jsonl once, after any number of resumes;
a validation that a stop cut off and a resume made up for has a line of its own.
"""

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared import disk
from shared.config import InputError, say
from shared.training.config import TrackingConfig
from shared.training.state import Folder

MAXRSS = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in a MiB


def start_trackers(
    accelerator: Accelerator, tracking: TrackingConfig, stage: Path, settings: dict[str, Any]
) -> None:
    """Begin the trackers that the recipe names, for a stage's folder in a run, with the flat recipe.

    A resume goes on in the same wandb run; both stages of a run are a group. wandb without a key or a network
    logs offline, and says so. Raises InputError where a tracker is not installed.
    """
    if not tracking.with_:
        return
    missing = [name for name in tracking.with_ if find_spec(name) is None]
    if missing:
        raise InputError(f"tracking.with: {missing[0]} is not installed: pip install {missing[0]}")
    options: dict[str, dict] = {}
    run = stage.parent
    later = f"'wandb sync {run}/wandb/offline-run-*' sends it later"
    if "wandb" in tracking.with_ and accelerator.is_main_process:
        options["wandb"] = {
            "name": f"{run.name} {stage.name}",
            "group": run.name,
            "job_type": stage.name,
            "id": _wandb_id(stage / "wandb_id"),
            "resume": "allow",
            "dir": str(run),
        }
        if not _wandb_has_a_key():
            options["wandb"]["mode"] = "offline"
            say(f"wandb: no key found, logging offline ({later})")
    plain = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()
    }
    try:
        accelerator.init_trackers(tracking.project, config=plain, init_kwargs=options)
    except Exception as error:  # wandb raises its own kinds, and those of what it asks the network by
        if "wandb" not in options or options["wandb"].get("mode") == "offline":
            raise
        say(f"wandb: {' '.join(str(error).split())[:200]}; logging offline ({later})")
        options["wandb"]["mode"] = "offline"
        accelerator.trackers.clear()  # those that were begun, with what they were told
        accelerator.init_trackers(tracking.project, config=plain, init_kwargs=options)


def _wandb_id(path: Path) -> str:
    """What wandb calls the training in a stage's folder, now and after a resume."""
    if not path.is_file():
        disk.write_text(path, f"{uuid.uuid4().hex}\n")
    return path.read_text().strip()


def _wandb_has_a_key() -> bool:
    """Whether wandb was told where to log: by its environment or by ~/.netrc."""
    netrc = disk.path_of("~/.netrc")
    known = netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
    return bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or known)


class Tracker:
    """Collects one line of numbers per step (steps count finished updates, from 1); `flush` writes them."""

    def __init__(self, path: Path, accelerator: Accelerator, step: int):
        self.path = path
        self.accelerator = accelerator
        self.pending: dict[int, dict[str, Any]] = {}
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resume will make again."""
        if self.path.is_file():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            disk.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, values: dict[str, Any]) -> None:
        self.pending.setdefault(step, {}).update(values)

    def flush(self) -> list[dict[str, float]]:
        """Write what is pending, averaged over the processes; returns those lines."""
        lines = self._fetch()
        self.pending = {}
        for line in lines:
            numbers = {key: value for key, value in line.items() if key != "step"}
            self.accelerator.log(numbers, step=line["step"])
        if lines and self.accelerator.is_main_process:
            lines[-1]["time"] = round(time.time(), 1)  # seconds since 1970
            with open(self.path, "a") as file:
                file.writelines(f"{json.dumps(_finite(line))}\n" for line in lines)
        return lines

    def _fetch(self) -> list[dict]:
        """The pending lines as plain numbers: one exchange between processes, one copy to the host."""
        if not self.pending:
            return []
        device = self.accelerator.device
        values = [value for line in self.pending.values() for value in line.values()]
        packed = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        numbers = iter(self.accelerator.reduce(packed, "mean").tolist())
        return [{"step": step} | {key: next(numbers) for key in line} for step, line in self.pending.items()]


def _finite(line: dict[str, float]) -> dict[str, float | None]:
    """A line as JSON knows numbers: null for what is not finite, as in a skipped step."""
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


# ---------------------------------------------------------------- how fast, how large


class Pace:
    """How fast a training goes between two flushes of its log, without validations, pictures and saves."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.begun = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done meanwhile does not count."""
        settled(self.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.begun += time.perf_counter() - started

    def waiting(self, data: Iterator[dict]) -> Iterator[dict]:
        """The batches, the time until each is there being counted."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(data)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def numbers(self) -> dict[str, float]:
        """Images a second over all processes, the share of the time spent waiting for data, peak memory."""
        settled(self.device)
        seconds = time.perf_counter() - self.begun
        found = {
            "speed/images_per_second": self.images / seconds,
            "speed/waiting_for_data": self.waited / seconds,
        }
        self.restart()
        return found | {f"memory/{name}": mib for name, mib in peak_memory(self.device).items()}


def settled(device: torch.device) -> None:
    """Wait until a GPU has done what it was given: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Trace:
    """Records what host and device compute from one step to another, on the first process."""

    def __init__(self, steps: list[int] | None, folder: Folder, accelerator: Accelerator):
        self.steps = steps if accelerator.is_main_process else None
        self.path = folder.path / "trace.json"
        self.profiler: torch.profiler.profile | None = None

    def at(self, step: int) -> None:
        """Begin, or end, before this step."""
        if self.steps and step == self.steps[0]:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.steps and step == self.steps[1]:
            self.end()

    def end(self) -> None:
        """Write the trace, if one is being recorded."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path))
            self.profiler = None


def peak_memory(device: torch.device) -> dict[str, float]:
    """MiB: the most that this process ever held, and the most that tensors took on a GPU."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MAXRSS}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
