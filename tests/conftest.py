"""What the tests share: tiny recipes, commands run as a user runs them, and real data where there are any."""

import atexit
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

# The environment as it was: what pytest_configure makes of it is inherited by a worker.
BEFORE = json.loads(os.environ.get("BEFORE_TESTS", "null")) or {
    name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "LATENT_STACK_WEIGHTS")
}
GPUS = BEFORE["CUDA_VISIBLE_DEVICES"]  # for tests/gpu
# What this process computes is compared with others to the bit: on a CPU.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LATENT_STACK_DATA") or ROOT.parent / "shared" / "data")
WEIGHTS = Path(BEFORE["LATENT_STACK_WEIGHTS"] or ROOT.parent / "shared" / "weights")
STARTED: list[subprocess.Popen] = []


def pytest_configure() -> None:
    """No GPU, no hub, no download of a backbone; what tests cache does not stay in the user's own folder.

    Benchmarks import from this file, too, and keep their environment.
    """
    cache = tempfile.mkdtemp(prefix="latent-stack-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ |= HIDDEN | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": cache, "LATENT_STACK_WEIGHTS": cache}
    os.environ["BEFORE_TESTS"] = json.dumps(BEFORE)
    torch.set_num_threads(1)  # the networks are tiny, and sums are then the same on every machine


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each test chooses its own."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def nobody_left():
    """A test that fails leaves no training behind."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(autouse=True)
def company(request, tmp_path_factory):
    """A slow test marked `alone` runs while no other slow one does: it is about time."""
    if request.node.get_closest_marker("slow") is None:
        yield
        return
    kind = fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH
    place = tmp_path_factory.getbasetemp().parent  # of all workers
    with open(place / "slow.lock", "w") as room:
        with open(place / "slow.door", "w") as door:  # nobody overtakes who waits for an empty room
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, kind)
        yield


@pytest.fixture
def data_sets() -> Path:
    if not DATA.is_dir():
        pytest.skip("no real data sets here (LATENT_STACK_DATA)")
    return DATA


@pytest.fixture
def weights() -> Path:
    if not WEIGHTS.is_dir():
        pytest.skip("no backbone weights here (LATENT_STACK_WEIGHTS)")
    return WEIGHTS


TRAINING = {
    "optim": {"name": "adamw", "lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "batch_size": 8,
    "max_steps": 8,
    "save_every": 4,
    "validate_every": 8,
    "preview_every": 8,
    "mixed_precision": "fp32",
}
GREY = {"channels": 1, "val_fraction": 0.1}
TINY = {
    "name": "tiny",
    "data": GREY | {"source": "digits", "image_size": 16, "limit": 64},
    "stage1": TRAINING
    | {
        "model": {
            "channels": [8, 16],
            "downsample": "stride",
            "upsample": "transposed",
            "head": "conv",
            "latent_shape": [4, 4, 4],
        },
        "loss_weights": {"l1": 1.0, "kl": 0.02},
    },
    "stage2": TRAINING
    | {"unet": {"channels": [24, 48], "blocks_per_level": 1, "attention_levels": [], "head_dim": 8}},
    "sampling": {"sampler": "euler", "guidance_scale": 1.0, "num_images": 6, "num_steps": 3},
}


@pytest.fixture
def tiny(tmp_path):
    """Writes a tiny recipe of digits, changed by keys (`stage1__max_steps`), and returns its path; the run is
    tmp/run."""

    def write(name="tiny.yaml", **changes) -> Path:
        import copy

        tree = copy.deepcopy(TINY) | {"run_dir": str(tmp_path / "run")}
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = GREY | value if key == "data" else value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def command(
    *arguments, cwd=None, timeout=120, check=True, launcher=(), **environment
) -> subprocess.CompletedProcess:
    """Run one of the project's commands in a process of its own, from another folder and without
    PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=cwd or "/",
        env=clean_environment(**environment),
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def clean_environment(**extra) -> dict:
    others = ("PYTHONPATH", "WANDB", "SLURM", "ACCELERATE_ARGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    return kept | HIDDEN | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def call(main, *arguments) -> None:
    """Run a command's main() in this process."""
    before = sys.argv
    sys.argv = ["command", *map(str, arguments)]
    try:
        main()
    finally:
        sys.argv = before


TRAIN1, ENCODE, TRAIN2 = (
    ROOT / "stage1_vae/train.py",
    ROOT / "stage1_vae/encode.py",
    ROOT / "stage2_diffusion/train.py",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")


def train_all(config, *overrides) -> None:
    """Both stages and the latents between them, in this process."""
    import stage1_vae.encode
    import stage1_vae.train
    import stage2_diffusion.train
    from shared import recipe

    run = recipe.load(config, overrides).run
    call(stage1_vae.train.main, "--config", config, *overrides)
    call(stage1_vae.encode.main, "--run", run)
    call(stage2_diffusion.train.main, "--config", config, *overrides)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run folder of the tiny recipe with both stages trained."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"run_dir": str(folder / "run")}))
    train_all(path)
    return folder / "run"


def training_tensors(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """Raw weights and optimizer state of a run's newest checkpoint."""
    from shared import disk
    from shared.training import checkpoint

    return disk.read_tensors(checkpoint.newest(run / stage / "checkpoints") / "training.safetensors")


def log(run: Path, stage: str) -> list[dict]:
    """What metrics.jsonl of a stage says, a line each; but for what the machine's pace decides."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("speed/", "memory/", "time"))} for line in lines
    ]


def averaged(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a run's newest checkpoint."""
    from shared import disk
    from shared.training import checkpoint

    folder = checkpoint.newest(run / stage / "checkpoints")
    return disk.read_tensors(next(folder.glob("*/diffusion_pytorch_model.safetensors")))


def hearing() -> None:
    """For a process that is about to begin.

    Tests in the background are born deaf to Ctrl-C, those under nohup to SIGHUP; a shell cannot unlearn it.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(config: Path, script: Path, launcher=(), **options) -> subprocess.Popen:
    """A training in the background; what it prints goes to started.log beside its recipe."""
    arguments = [sys.executable, *launcher, str(script), "--config", str(config)]
    with open(config.parent / "started.log", "w") as output:
        process = subprocess.Popen(
            arguments, cwd="/", env=clean_environment(), stdout=output, stderr=subprocess.STDOUT, **options
        )
    STARTED.append(process)
    return process


def wait_for(path, process) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def assert_equal_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:3]


def write_images(folder: Path, count: int = 6, size=(20, 24), mode="RGB") -> Path:
    """A folder of different PNG images."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (*size, len(mode)) if len(mode) > 1 else size
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{i}.png")
    return folder
