"""How processes join, what each asks of the system, how they wait for the first and stop at the same step.

Does not depend on what is trained.
"""

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)

from shared.config import InputError
from shared.data.batches import cores
from shared.disk import Lock
from shared.training.config import TrainConfig

PATIENCE = timedelta(hours=2)  # with what one process does alone, such as a slow save
# What torchrun, accelerate and launch.sh leave in the environment of what they start.
LAUNCHED = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "LATENT_STACK_LAUNCHED"}
PR_SET_PDEATHSIG = 1  # prctl
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # mallopt


def join_processes() -> PartialState:
    """This process among those the launcher started. Accelerate must be told that several may be on a CPU."""
    group: dict[str, Any] = {}
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart != "0":
        # torchrun keeps its store: without a prefix a process may find the address of one that died before
        # the restart
        store, rank, world_size = next(torch.distributed.rendezvous("env://"))
        prefixed = torch.distributed.PrefixStore(f"restart {restart}", store)
        group = {"store": prefixed, "rank": rank, "world_size": world_size}
    # What is drawn and measured in float32 is what a CPU finds; training computes in bfloat16 there.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE, **group)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        # Or after an error its threads may end the process with an abort. NCCL would wait for the others.
        atexit.register(state.destroy_process_group)
    return state


def bf16_pays(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def make_accelerator(
    config: TrainConfig, trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Accelerate for one stage: its precision, processes and trackers."""
    settle_process()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    device = join_processes().device
    if config.deterministic and device.type == "cuda":  # the fused kernels only warn
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    bf16 = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and bf16_pays(device))
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )


def settle_process() -> None:
    """No more threads than cores, and two requests to Linux.

    SIGTERM when a launcher, or launch.sh, dies, so that no worker is left behind and each saves first. And
    glibc's malloc shall keep what was freed: by default it returns every large tensor to the system, and the
    page faults that follow cost a CPU training 15 to 40 % of its speed.
    """
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if LAUNCHED & os.environ.keys():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # no block of its own for a large tensor
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink
        libc.mallopt(M_TOP_PAD, 64 << 20)  # grow in steps of 64 MiB


def on_first_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """What an action, such as writing to disk, returns on the first process; the others wait for it.

    An InputError reaches all of them; of any other error the others hear that there was one, and end.
    """
    outcome: list[Any] = [None, None]  # what it returned, and what went wrong
    failure = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = error
        except Exception as error:
            failure = error
            outcome[1] = RuntimeError(f"the first process failed: {type(error).__name__}: {error}")
    returned, trouble = broadcast_object_list(outcome)
    if failure or trouble:
        raise failure or trouble
    return returned


def over_processes(local: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The mean over all processes of what each computed of its own images, with the gradient of that part.

    Gradients are averaged over the processes afterwards, which makes the gradient that of the whole batch.
    """
    if accelerator.num_processes == 1:
        return local
    own = local.detach()
    return local + (accelerator.reduce(own.clone(), "mean") - own)


@contextmanager
def alone_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Nobody else works in a folder meanwhile. Raises InputError, naming who does, on all processes."""
    lock = Lock(folder)
    on_first_process(accelerator, lock.take)
    try:
        yield
    finally:
        lock.release()


class Stopped(Exception):
    """A stop was asked for in the middle of a validation."""


class StopFlag:
    """Remembers SIGTERM, SIGUSR1 (a batch system's warning), SIGHUP (a terminal that went) or Ctrl-C.

    Until the running step is done; all processes stop at the same one. A second Ctrl-C stops at once, without
    saving. Under nohup SIGHUP stays ignored.
    """

    EVERY = 4  # steps between two questions to the other processes
    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signal = 0

    def __enter__(self) -> "StopFlag":
        deaf = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        heard = [number for number in self.SIGNALS if number not in deaf]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def raised(self) -> int:
        """The signal that any process has received, 0 for none. Every process must ask."""
        if self.accelerator.num_processes == 1:
            return self.signal
        mine = torch.tensor([float(self.signal)], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def after(self, step: int) -> int:
        """`raised`, asked after some of the steps only where asking costs an exchange."""
        if self.accelerator.num_processes > 1 and step % self.EVERY:
            return 0
        return self.raised()

    def watch(self, parts: Iterable) -> Iterator:
        """The parts of a validation, up to a stop: then raises Stopped, on all processes at the same part."""
        for part in parts:
            if self.raised():
                raise Stopped
            yield part
