"""The log of a run: metrics.jsonl always; wandb and tensorboard through Accelerate when the recipe asks.

Values may be tensors on a device: they stay there and are fetched many steps at a time, so that logging every step
costs no wait. Each step stands in metrics.jsonl once, after any number of resumes.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import torch

from shared.config import InputError, say
from shared.disk import write_whole


def start_trackers(accelerator, names: list[str], project: str, run: Path, settings: dict) -> None:
    """Begin the trackers that the recipe names, with its flat settings. wandb without a key logs offline, and says so."""
    if not names:
        return
    if missing := [name for name in names if find_spec(name) is None]:
        raise InputError(f"tracking.with: {missing[0]} is not installed: pip install {missing[0]}")
    options = {}
    if "wandb" in names:
        options["wandb"] = {"name": run.name, "dir": str(run)}
        if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or _netrc_knows_wandb()):
            os.environ["WANDB_MODE"] = "offline"
            say(f"wandb: no key found, logging offline ('wandb sync {run}/wandb/offline-run-*' sends it later)")
    plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
    accelerator.init_trackers(project, config=plain, init_kwargs=options)


def _netrc_knows_wandb() -> bool:
    path = Path("~/.netrc").expanduser()
    return path.is_file() and "wandb" in path.read_text(errors="ignore")


class Tracker:
    """Collects one line of numbers per step (steps count finished updates, from 1); `flush` writes them."""

    def __init__(self, folder: Path, accelerator, step: int):
        self.path, self.accelerator, self.pending = folder / "metrics.jsonl", accelerator, {}
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resume will make again."""
        if self.path.is_file():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, values: dict) -> None:
        self.pending.setdefault(step, {}).update(values)

    def flush(self) -> list[dict[str, float]]:
        """Write what is pending, averaged over the processes; returns those lines."""
        lines = self._fetch()
        self.pending = {}
        for line in lines:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        if lines and self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)
        return lines

    def _fetch(self) -> list[dict]:
        """The pending lines as plain numbers: one exchange between processes, one copy to the host."""
        if not self.pending:
            return []
        device = self.accelerator.device
        values = [v for line in self.pending.values() for v in line.values()]
        packed = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in values])
        numbers = iter(self.accelerator.reduce(packed, "mean").tolist())
        return [{"step": step} | {key: next(numbers) for key in line} for step, line in self.pending.items()]
