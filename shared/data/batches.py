"""The order of batches, and the loader processes that make them."""

import atexit
import functools
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from shared.config import InputError
from shared.training.config import TrainConfig


@dataclass
class BatchOrder:
    """Which images each step sees: positions of an endless row of permutations, a new one for each epoch.

    A pure function of (seed, step): a resume needs nothing stored, and every image is seen equally often, also where
    there are fewer images than a batch has.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self):
        self._permutation = functools.lru_cache(2)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(self.count))

    def __call__(self, step: int) -> np.ndarray:
        """Positions (batch_size,) of the global batch of a step."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = places // self.count, places % self.count
        return np.concatenate([self._permutation(int(e))[within[epochs == e]] for e in np.unique(epochs)])


class _Shares:
    """The micro-batches of one process, as lists (start, stop, positions) for a DataLoader."""

    def __init__(self, order: BatchOrder, config: TrainConfig, start: int, stop: int, rank: int, processes: int):
        self.order, self.steps, self.rank, self.processes = order, range(start, stop), rank, processes
        self.parts = config.grad_accumulation
        self.rows, rest = divmod(config.batch_size, self.parts * processes)
        if rest:
            raise InputError(
                f"batch_size: {config.batch_size} cannot be shared out over {processes} processes x "
                f"{self.parts} micro-batches; take a multiple of {self.parts * processes}"
            )

    def __iter__(self):
        for step in self.steps:
            positions = self.order(step)
            for part in range(self.parts):
                first = (part * self.processes + self.rank) * self.rows
                yield [(first, first + self.rows, positions[first : first + self.rows])]

    def __len__(self) -> int:
        return len(self.steps) * self.parts


class _Fetch(Dataset):
    """Turns a share (start, stop, positions) into a batch that knows its rows of the global batch."""

    def __init__(self, data: Dataset):
        self.data, self.num_workers = data, data.num_workers

    def __getitems__(self, shares: list) -> dict:
        start, stop, positions = shares[0]
        return self.data.__getitems__(positions) | {"rows": slice(start, stop)}


def _workers(data: Dataset, accelerator) -> int:
    """Loader processes: as the data say; left open, one per core on a GPU machine and none on a CPU, where the
    trainer itself needs every core."""
    if data.num_workers is not None:
        return data.num_workers
    return min(8, (os.cpu_count() or 1) // accelerator.num_processes) if accelerator.device.type == "cuda" else 0


def _loader(data: Dataset, batch_sampler, accelerator) -> DataLoader:
    workers, pin = _workers(data, accelerator), accelerator.device.type == "cuda"
    if workers:
        _end_loaders_at_exit()
    return DataLoader(
        data, batch_sampler=batch_sampler, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin, worker_init_fn=_leave_signals
    )


def _as_it_is(batch: dict) -> dict:
    return batch


def _leave_signals(worker: int) -> None:
    """A loader process leaves signals to the trainer, which still needs batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def _end_loaders_at_exit() -> None:
    """Otherwise a program that ends in an error waits for ever: Python's own farewell to them is the SIGTERM they leave to it."""

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the death of a loader for an accident
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(end)


def batches(data: Dataset, config: TrainConfig, seed: int, start: int, stop: int, accelerator):
    """An iterator over this process's micro-batches of the steps start..stop-1."""
    order = BatchOrder(len(data), config.batch_size, seed)
    shares = _Shares(order, config, start, stop, accelerator.process_index, accelerator.num_processes)
    return iter(_loader(_Fetch(data), shares, accelerator))


def in_order(data: Dataset, rows: Sequence[int], batch_size: int, accelerator) -> DataLoader:
    """Some rows of a data set once, in their order, `batch_size` at a time."""
    shares = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return _loader(data, [list(share) for share in shares], accelerator)
