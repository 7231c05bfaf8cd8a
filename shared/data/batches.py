"""The order of batches, and the loader processes that make them. Does not depend on what a batch holds."""

import atexit
import functools
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from shared.config import InputError, say
from shared.training.config import TrainConfig

SHARED_MEMORY = 1 << 30  # bytes of /dev/shm, without which there are no loader processes


class Batches(Protocol):
    """A data set as the loop reads it: batches by position, and what each position is called in a message."""

    @property
    def num_workers(self) -> int | None: ...

    @property
    def called(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitems__(self, positions: Sequence[int], /) -> dict[str, torch.Tensor]: ...


@dataclass
class BatchOrder:
    """Which images each step sees: positions of an endless row of permutations, a new one for each epoch.

    A pure function of (seed, step): a resume needs nothing stored, and every image is seen equally often,
    also where there are fewer images than a batch has.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, epoch]).permutation(self.count)

        self._permutation = functools.lru_cache(2)(permutation)

    def __call__(self, step: int) -> np.ndarray:
        """Positions (batch_size,) of the global batch of a step."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = places // self.count
        within = places % self.count
        return np.concatenate(
            [self._permutation(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )


class _Shares:
    """The micro-batches of one process, as lists (start, stop, positions) for a DataLoader."""

    def __init__(self, order: BatchOrder, config: TrainConfig, steps: range, rank: int, processes: int):
        self.order = order
        self.steps = steps
        self.rank = rank
        self.processes = processes
        self.parts = config.grad_accumulation
        self.rows, rest = divmod(config.batch_size, self.parts * processes)
        if rest:
            raise InputError(
                f"batch_size: {config.batch_size} cannot be shared out over {processes} processes x "
                f"{self.parts} micro-batches; take a multiple of {self.parts * processes}"
            )

    def __iter__(self) -> Iterator[list]:
        for step in self.steps:
            positions = self.order(step)
            for part in range(self.parts):
                first = (part * self.processes + self.rank) * self.rows
                yield [(first, first + self.rows, positions[first : first + self.rows])]

    def __len__(self) -> int:
        return len(self.steps) * self.parts


class _Fetch(Dataset):
    """Turns a share (start, stop, positions) into a batch that knows its rows of the global batch."""

    def __init__(self, data: Batches):
        self.data = data
        self.num_workers = data.num_workers

    def __getitems__(self, shares: list) -> dict[str, Any]:
        start, stop, positions = shares[0]
        return self.data.__getitems__(positions) | {"rows": slice(start, stop)}


def batches(
    data: Batches, config: TrainConfig, seed: int, start: int, stop: int, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """An iterator over this process's micro-batches of the steps start..stop-1."""
    order = BatchOrder(len(data), config.batch_size, seed)
    shares = _Shares(order, config, range(start, stop), accelerator.process_index, accelerator.num_processes)
    return iter(in_parts(_Fetch(data), shares, accelerator))


def in_order(data: Batches, rows: Sequence[int], batch_size: int, accelerator: Accelerator) -> DataLoader:
    """Some rows of a data set once, in their order, `batch_size` at a time."""
    parts = [list(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
    return in_parts(data, parts, accelerator)


def in_parts(data: Any, parts: Any, accelerator: Accelerator) -> DataLoader:
    """A batch of each of these lists of rows of a data set."""
    count = workers(data.num_workers, accelerator)
    if count:
        _end_loaders_at_exit()
    return DataLoader(
        data,
        batch_sampler=parts,
        collate_fn=_as_it_is,
        num_workers=count,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=_leave_signals,
    )


def workers(wanted: int | None, accelerator: Accelerator) -> int:
    """How many loader processes: as the data say, else a share of the cores on a GPU machine, none on a CPU.

    On a CPU the trainer itself needs every core. Batches come through /dev/shm, of which containers often
    have 64 MiB: with too little of it a loader would die of a bus error.
    """
    if wanted is not None:
        return wanted
    if accelerator.device.type != "cuda" or _little_shared_memory():
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, as launchers say
    return min(8, cores() // here)


def cores() -> int:
    """CPU cores that this process may use: of its affinity, and no more than the quota of a container."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(here, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is none, or it says max
        return here


@functools.cache
def _little_shared_memory() -> bool:
    """Whether loader processes have too little of it; says so once."""
    shared = Path("/dev/shm")
    elsewhere = 0 if sys.platform == "linux" else SHARED_MEMORY  # other systems have no such folder
    free = shutil.disk_usage(shared).free if shared.is_dir() else elsewhere
    if free < SHARED_MEMORY:
        cure = "more of it, such as docker run --shm-size=8g, lets loader processes read them"
        say(f"note: {free >> 20} MiB of shared memory: images are read by the trainer itself; {cure}")
    return free < SHARED_MEMORY


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """A loader process leaves signals to the trainer, which still needs batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _end_loaders_at_exit() -> None:
    """Kill the loader processes at exit.

    Otherwise a program that ends in an error waits for ever: torch ends its loaders by SIGTERM, which they
    ignore.
    """

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the death of a loader for an accident
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(end)
