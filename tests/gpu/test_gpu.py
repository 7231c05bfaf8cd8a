"""What only a GPU can show: `./launch.sh test -m gpu`. Each command runs in a process that sees the GPUs.

This process itself does not, see conftest.py. LATENT_STACK_GPU_TESTS=cpu runs the same on a CPU, to see that
the tests themselves work.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from shared.training import checkpoint
from tests.conftest import (
    ENCODE,
    GPUS,
    HIDDEN,
    ROOT,
    TRAIN1,
    TRAIN2,
    assert_equal_bits,
    clean_environment,
    log,
    training_tensors,
)

ON_CPU = os.environ.get("LATENT_STACK_GPU_TESTS") == "cpu"
COUNT = "import torch; print(torch.cuda.device_count())"


def seen() -> dict[str, str]:
    """An environment in which a process sees the GPUs."""
    if ON_CPU:
        return clean_environment()
    kept = {key: value for key, value in clean_environment().items() if key not in HIDDEN}
    return kept | ({} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS})


def gpus() -> int:
    return 2 if ON_CPU else int(subprocess.check_output([sys.executable, "-c", COUNT], env=seen()))


def on_gpu(*arguments, launcher=()) -> str:
    """What a command of ours says, run where the GPUs are seen."""
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT, env=seen(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and gpus() == 0, reason="no GPU that PyTorch can use"),
]


def train_all(config, *overrides, launcher=()) -> None:
    on_gpu(TRAIN1, "--config", config, *overrides, launcher=launcher)
    on_gpu(ENCODE, "--run", config.parent / "run", launcher=launcher)
    on_gpu(TRAIN2, "--config", config, *overrides, launcher=launcher)


def all_of_them() -> tuple[str, ...]:
    """What starts a process on each GPU; skips the test where there is one."""
    if gpus() < 2:
        pytest.skip("one GPU alone")
    count = max(n for n in (2, 4, 8) if n <= gpus())
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "--")


PARTS = {"grad_accumulation": 2, "batch_size": 32}
BF16 = {"stage1__mixed_precision": "bf16", "stage2__mixed_precision": "bf16"}


def test_both_stages_learn_in_bf16(tiny, tmp_path):
    config = tiny(stage1__max_steps=40, stage2__max_steps=40, stage1__optim__lr=3e-3, **BF16)
    train_all(config)
    for stage, term in (("stage1_vae", "loss/l1"), ("stage2_diffusion", "loss/denoising")):
        lines = log(tmp_path / "run", stage)
        assert lines[-1][term] < 0.9 * lines[0][term]
        assert all(value.dtype.itemsize >= 4 for value in training_tensors(tmp_path / "run", stage).values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resume_is_bit_equal(tiny, tmp_path, optimizer):
    config = tiny(stage1__deterministic=True, stage1__optim__name=optimizer, stage1__model__channels=[16, 32])
    on_gpu(TRAIN1, "--config", config, f"run_dir={tmp_path}/whole")
    for steps in (3, 8):
        on_gpu(TRAIN1, "--config", config, f"stage1.max_steps={steps}")
    runs = (training_tensors(tmp_path / name, "stage1_vae") for name in ("whole", "run"))
    assert_equal_bits(*runs)


def test_a_resume_of_stage_2_is_bit_equal(tiny, tmp_path):
    """Its UNet has attention, whose fused kernels are not deterministic."""
    config = tiny(stage2__deterministic=True, stage1__max_steps=2)
    on_gpu(TRAIN1, "--config", config)
    on_gpu(ENCODE, "--run", tmp_path / "run")
    on_gpu(TRAIN2, "--config", config, f"run_dir={tmp_path}/whole", f"stage2.latents={tmp_path}/run/latents")
    for steps in (3, 8):
        on_gpu(TRAIN2, "--config", config, f"stage2.max_steps={steps}")
    runs = (training_tensors(tmp_path / name, "stage2_diffusion") for name in ("whole", "run"))
    assert_equal_bits(*runs)


def test_all_gpus_train_what_one_does(tiny, tmp_path):
    config = tiny()
    on_gpu(TRAIN1, "--config", config, f"run_dir={tmp_path}/one")
    on_gpu(TRAIN1, "--config", config, launcher=all_of_them())
    for a, b in zip(*(log(tmp_path / name, "stage1_vae") for name in ("one", "run")), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], abs=1e-4)


def test_all_gpus_share_both_stages_and_the_latents(tiny, tmp_path):
    """With Muon, bfloat16, parts of a batch and the discriminator."""
    adversarial = {"stage1__loss_weights__adversarial": 0.05, "stage1__discriminator__start_step": 2}
    muon = {f"{stage}__optim__name": "muon" for stage in ("stage1", "stage2")}
    parts = {f"{stage}__{key}": n for stage in ("stage1", "stage2") for key, n in PARTS.items()}
    config = tiny(**adversarial, **muon, **parts, **BF16)
    train_all(config, launcher=all_of_them())
    on_gpu(TRAIN1, "--config", config, f"run_dir={tmp_path}/one")
    for a, b in zip(*(log(tmp_path / name, "stage1_vae") for name in ("one", "run")), strict=True):
        assert a["loss/l1"] == pytest.approx(b["loss/l1"], abs=0.02)
    assert log(tmp_path / "run", "stage2_diffusion")[-1]["loss/denoising"] < 5


def test_a_resume_on_all_gpus_is_bit_equal(tiny, tmp_path):
    config = tiny(stage1__deterministic=True, stage1__optim__name="muon")
    launcher = all_of_them()
    on_gpu(TRAIN1, "--config", config, f"run_dir={tmp_path}/whole", launcher=launcher)
    for steps in (3, 8):
        on_gpu(TRAIN1, "--config", config, f"stage1.max_steps={steps}", launcher=launcher)
    runs = (training_tensors(tmp_path / name, "stage1_vae") for name in ("whole", "run"))
    assert_equal_bits(*runs)


def test_samples_are_those_of_the_cpu_and_nearly_so_in_half_precision(tiny, tmp_path):
    """Within a grey level of the CPU's, which this process draws; and the export in fp16."""
    from shared import generate
    from tests.conftest import call

    train_all(tiny())
    run = tmp_path / "run"
    flags = ["--num-images", "8", "--num-steps", "4"]
    on_gpu("-m", "shared.generate", "--run", run, "--out", tmp_path / "gpu", *flags)
    half = ["--dtype", "bf16" if ON_CPU else "fp16"]
    on_gpu("-m", "shared.generate", "--run", run / "pipeline", "--out", tmp_path / "half", *half, *flags)
    call(generate.main, "--run", run, "--out", tmp_path / "cpu", *flags)
    gpu, rounded, cpu = (
        np.load(tmp_path / name / "samples.npz")["x"].astype(float) for name in ("gpu", "half", "cpu")
    )
    assert np.abs(gpu - cpu).max() <= 1 and np.abs(rounded - cpu).mean() <= 4


CALLS = """
import sys, torch
from shared import trained
from pathlib import Path
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
for dtype in (torch.float32, torch.bfloat16):
    pipe = trained.open_pipeline(Path(sys.argv[1]), dtype=dtype).to(device)
    x = torch.full((1, 1, 16, 16), 128 / 255, device=device)
    half = torch.zeros(1, 1, 16, 16, device=device)
    half[..., 8:] = 1
    painted = pipe([1, 2], image=x, mask_image=half, num_inference_steps=2).values
    changed = pipe([1, 2], image=x, strength=0.5, num_inference_steps=2).values
    restored = pipe([1, 2], image=x, operator=lambda y: y * half.to(y), num_inference_steps=2).values
    print(*((values != 128).any((0, 1, 2)).sum() for values in (painted, changed, restored)))
"""


def test_images_on_the_gpu_are_changed_there(tiny, tmp_path):
    """In fp32 and bf16: columns of 16 that are no longer grey. Outside of a mask all are."""
    train_all(tiny())
    for line in on_gpu("-c", CALLS, tmp_path / "run").splitlines()[-2:]:
        painted, changed, restored = map(int, line.split())
        assert 0 < painted <= 8 and changed == restored == 16


@pytest.mark.skipif(ON_CPU, reason="minutes of compiling say nothing there")
def test_a_compiled_training_is_the_same(tiny, tmp_path):
    config = tiny(stage1__max_steps=4)
    on_gpu(TRAIN1, "--config", config, f"run_dir={tmp_path}/plain")
    on_gpu(TRAIN1, "--config", config, "stage1.compile=true")
    a, b = (log(tmp_path / name, "stage1_vae")[-1] for name in ("plain", "run"))
    assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-3)


def test_the_log_has_the_memory_of_the_device(tiny, tmp_path):
    on_gpu(TRAIN1, "--config", tiny())
    path = tmp_path / "run" / "stage1_vae" / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    assert ("memory/device" in last) != ON_CPU
    assert checkpoint.newest(tmp_path / "run" / "stage1_vae" / "checkpoints").name == "step_00000008"
