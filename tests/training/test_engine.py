"""A run can be stopped anywhere and goes on as if it had not been; processes change nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator

import stage1_vae.encode
import stage1_vae.train
import stage2_diffusion.train
from shared import disk, recipe
from shared.config import InputError
from shared.data import batches, sources, splits
from shared.training import checkpoint
from shared.training.config import TrackingConfig
from shared.training.processes import StopFlag, make_accelerator
from shared.training.tracker import start_trackers
from stage1_vae.stage import VAEStage
from tests.conftest import (
    ROOT,
    TINY,
    TORCHRUN,
    TRAIN1,
    TRAIN2,
    assert_equal_bits,
    averaged,
    call,
    clean_environment,
    command,
    hearing,
    log,
    started,
    training_tensors,
    wait_for,
    write_images,
)

STAGES = {
    "stage1_vae": (TRAIN1, stage1_vae.train.main),
    "stage2_diffusion": (TRAIN2, stage2_diffusion.train.main),
}


def latents_for(tiny, folder, **changes):
    """A recipe whose stage-1 run folder has latents, for stage 2 to be trained in."""
    config = tiny(**changes)
    call(stage1_vae.train.main, "--config", config)
    call(stage1_vae.encode.main, "--run", folder / "run")
    return config


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_and_the_same_command_again_is_bit_equal(tiny, tmp_path, stage):
    script, main = STAGES[stage]
    key = stage.split("_")[0]
    changes = {
        f"{key}__max_steps": 40,
        f"{key}__save_every": 7,
        f"{key}__optim": {"name": "adamw", "lr": 1e-3, "schedule": "cosine"},
    }
    config = latents_for(tiny, tmp_path) if key == "stage2" else None
    config = tiny(**changes)
    process = started(config, script)
    wait_for(tmp_path / "run" / stage / "checkpoints" / "step_00000014", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / stage / "checkpoints" / "step_00000040").exists(), (
        "too late: nothing was interrupted"
    )
    again = command(script, "--config", config)
    assert "resuming from" in again.stdout

    undisturbed = tmp_path / "undisturbed"
    source = [f"stage2.latents={tmp_path}/run/latents"] if key == "stage2" else []
    call(main, "--config", config, f"run_dir={undisturbed}", *source)
    assert_equal_bits(training_tensors(tmp_path / "run", stage), training_tensors(undisturbed, stage))
    assert_equal_bits(averaged(tmp_path / "run", stage), averaged(undisturbed, stage))
    lines = log(tmp_path / "run", stage)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines == log(undisturbed, stage)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 128 + signal.SIGUSR1),
    ],
)
def test_a_polite_signal_saves_first(tiny, tmp_path, number, code):
    config = tiny(stage1__max_steps=100_000, stage1__save_every=50_000)
    process = started(config, TRAIN1, preexec_fn=hearing)
    wait_for(tmp_path / "run" / "stage1_vae" / "metrics.jsonl", process)
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert "checkpoint saved" in (tmp_path / "started.log").read_text()
    saved = checkpoint.newest(tmp_path / "run" / "stage1_vae" / "checkpoints")
    assert log(tmp_path / "run", "stage1_vae")[-1]["step"] == checkpoint.step_of(saved)


SPY = """
import hashlib, os
from shared.training import engine, state
fit = engine.fit
def spied(stage, *rest):
    fit(stage, *rest)
    found = b"".join(tensor.numpy().tobytes() for tensor in state.tensors(stage).values())
    open(r"{place}/rank" + os.environ["RANK"], "w").write(hashlib.sha256(found).hexdigest())
engine.fit = spied
from {package} import train
train.main()
"""


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(tiny, tmp_path, stage):
    """The same weights within rounding; and each rank writes the hash of its own after the training."""
    _, main = STAGES[stage]
    config = latents_for(tiny, tmp_path)
    source = [f"stage2.latents={tmp_path}/run/latents"] if stage == "stage2_diffusion" else []
    (tmp_path / "spy.py").write_text(SPY.format(place=tmp_path, package=stage))
    call(main, "--config", config, f"run_dir={tmp_path}/run1", *source)
    command(tmp_path / "spy.py", "--config", config, f"run_dir={tmp_path}/run2", *source, launcher=TORCHRUN)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    one, two = (
        (training_tensors(run, stage), log(run, stage)) for run in (tmp_path / "run1", tmp_path / "run2")
    )
    for name in one[0]:
        torch.testing.assert_close(one[0][name], two[0][name], atol=2e-5, rtol=1e-3, msg=name)
    for a, b in zip(one[1], two[1], strict=True):
        assert a == pytest.approx(b, abs=1e-4, rel=1e-3)


def test_same_seed_same_bytes_other_seed_other_bytes(tiny, tmp_path):
    config = tiny(stage1__max_steps=3)
    manifests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call(stage1_vae.train.main, "--config", config, f"run_dir={tmp_path}/{name}", f"seed={seed}")
        manifests.append(
            (checkpoint.newest(tmp_path / name / "stage1_vae" / "checkpoints") / "MANIFEST.json").read_text()
        )
    assert manifests[0] == manifests[1] != manifests[2]


def test_previews_and_validation_do_not_disturb(tiny, tmp_path):
    config = tiny()
    for name, every in (("often", 1), ("never", 100)):
        changes = [f"stage1.{k}_every={every}" for k in ("save", "validate", "preview")]
        call(stage1_vae.train.main, "--config", config, f"run_dir={tmp_path}/{name}", *changes)
    assert_equal_bits(
        training_tensors(tmp_path / "often", "stage1_vae"), training_tensors(tmp_path / "never", "stage1_vae")
    )
    assert len(list((tmp_path / "often/stage1_vae/previews").iterdir())) == 8


def test_a_run_refuses_another_recipe(tiny, tmp_path):
    config = tiny(stage1__max_steps=2)
    call(stage1_vae.train.main, "--config", config)
    with pytest.raises(InputError, match=r"stage1\.loss_weights\.kl: 0\.02 -> 0\.5"):
        call(stage1_vae.train.main, "--config", config, "stage1.loss_weights.kl=0.5")
    call(
        stage1_vae.train.main,
        "--config",
        config,
        "stage1.max_steps=3",
        "stage1.save_every=2",
        "data.num_workers=0",
    )
    assert log(tmp_path / "run", "stage1_vae")[-1]["step"] == 3


def test_fewer_steps_than_were_taken_are_told(tiny, tmp_path, capsys):
    config = tiny(stage1__max_steps=2)
    call(stage1_vae.train.main, "--config", config)
    call(stage1_vae.train.main, "--config", config)
    assert "keeps its" not in capsys.readouterr().out
    call(stage1_vae.train.main, "--config", config, "stage1.max_steps=1")
    assert "the stage keeps its 2 steps although max_steps is 1; name=ANOTHER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("quota", "most"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 10**6)]
)
def test_no_more_cores_are_taken_than_a_container_has(monkeypatch, quota, most):
    monkeypatch.setattr(batches.Path, "read_text", lambda _: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert batches.cores() == min(most, 8)


def test_a_training_that_only_skips_stops_and_saves_nothing(tiny, tmp_path, monkeypatch):
    """NaN in the data that came after they were looked through."""
    x = np.zeros((32, 16, 16), np.float32)
    np.save(tmp_path / "x.npy", x)
    transform = {"kind": "range", "low": 0.0, "high": 1.0}
    config = tiny(data={"source": str(tmp_path / "x.npy"), "image_size": 16, "value_transform": transform})
    data = recipe.load(config).data
    x[splits.split(sources.open_source(data), data)[0].indices] = np.nan
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(splits, "finite", lambda *_: ())
    with pytest.raises(InputError, match="steps 1 to 4: no finite gradient"):
        call(stage1_vae.train.main, "--config", config)
    assert not list((tmp_path / "run").rglob("step_*"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_one_line(tiny, tmp_path, monkeypatch, error):
    def out_of_memory(*_):
        raise error

    monkeypatch.setattr(VAEStage, "train_step", out_of_memory)
    with pytest.raises(InputError, match="batch_size: 8 images in 1 part.* do not fit into memory"):
        call(stage1_vae.train.main, "--config", tiny())
    assert not list((tmp_path / "run").glob("*/checkpoints/*"))


def test_containers_with_little_shared_memory_get_no_loaders(monkeypatch, capsys):
    gpu = SimpleNamespace(device=torch.device("cuda"))
    batches._little_shared_memory.cache_clear()
    monkeypatch.setattr(batches, "SHARED_MEMORY", 0)
    assert batches.workers(None, gpu) >= 1
    batches._little_shared_memory.cache_clear()
    monkeypatch.setattr(batches, "SHARED_MEMORY", 1 << 60)
    assert [batches.workers(None, gpu), batches.workers(None, gpu), batches.workers(3, gpu)] == [0, 0, 3]
    assert capsys.readouterr().out.count("MiB of shared memory") == 1
    batches._little_shared_memory.cache_clear()


def test_a_batch_that_cannot_be_shared_out(tiny):
    done = command(TRAIN1, "--config", tiny(stage1__batch_size=9), launcher=TORCHRUN, check=False)
    assert done.returncode and "take a multiple of 2" in done.stderr


OTHER_WEIGHTS = """
import os, torch
from shared.training import engine
step_ = engine._micro_step
def drifting(stage, batch, config, seed, step, *rest):
    if step == 2 and os.environ["RANK"] == "1":
        next(iter(stage.models["vae"].parameters())).data[0] += 1e-7
    return step_(stage, batch, config, seed, step, *rest)
engine._micro_step = drifting
from stage1_vae import train
from shared import config
config.run(train.main)
"""


def test_weights_that_differ_between_processes_are_never_saved(tiny, tmp_path):
    (tmp_path / "drift.py").write_text(OTHER_WEIGHTS)
    config = tiny(stage1__save_every=2)
    done = command(tmp_path / "drift.py", "--config", config, launcher=TORCHRUN, check=False)
    assert done.returncode and "is not the same on all processes; not saved" in done.stderr
    assert [path.name for path in (tmp_path / "run/stage1_vae/checkpoints").iterdir()] == ["step_00000002"]


def test_a_longer_training_says_what_becomes_of_the_rate(tiny, tmp_path, capsys):
    config = tiny(stage1__optim__schedule="cosine", stage1__max_steps=4)
    call(stage1_vae.train.main, "--config", config)
    call(stage1_vae.train.main, "--config", config, "stage1.max_steps=8")
    said = capsys.readouterr().out
    change = "the learning rate goes on at 0.0005 where it stood at 0"
    assert f"max_steps is 8 now, it was 4: {change}" in said
    call(stage1_vae.train.main, "--config", config, "stage1.max_steps=8")
    assert "max_steps" not in capsys.readouterr().out


def test_a_guide_that_stood_still_stays_so_in_a_longer_training(tiny, tmp_path, trained):
    """Of 20 steps it would be the average of the first ten; it was made of the first four, and is kept."""
    config = tiny(stage2__latents=str(trained / "latents"), stage2__guide_at=0.5)
    guides = []
    for steps in (8, 20):
        call(stage2_diffusion.train.main, "--config", config, f"stage2.max_steps={steps}")
        folder = checkpoint.newest(tmp_path / "run" / "stage2_diffusion" / "checkpoints")
        guides.append(disk.read_tensors(folder / "guide" / "diffusion_pytorch_model.safetensors"))
    assert_equal_bits(*guides)


def test_the_same_images_at_another_place_go_on(tiny, tmp_path):
    """Other images at the same place do not, and nothing of the run is touched."""
    write_images(tmp_path / "here", 20)
    config = tiny(data={"source": str(tmp_path / "here"), "channels": 3, "image_size": 16})
    for steps, place in ((4, "here"), (8, "there")):
        if place == "there":
            (tmp_path / "here").rename(tmp_path / "there")
        flags = [f"data.source={tmp_path / place}", f"stage1.max_steps={steps}"]
        call(stage1_vae.train.main, "--config", config, *flags)
    assert len(log(tmp_path / "run", "stage1_vae")) == 8
    (tmp_path / "there" / "3.png").write_bytes((tmp_path / "there" / "4.png").read_bytes())
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(InputError, match="made with another recipe \\(content: "):
        call(stage1_vae.train.main, "--config", config, *flags[:1], "stage1.max_steps=9")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe


@pytest.mark.parametrize("asked", [True, False])
def test_deterministic_asks_torch_for_it(tiny, asked):
    code = "import torch; from stage1_vae import train; train.main()\n"
    code += "print(torch.are_deterministic_algorithms_enabled())"
    config = tiny(stage1__deterministic=asked, stage1__max_steps=1)
    assert command("-c", code, "--config", config, cwd=ROOT).stdout.splitlines()[-1] == str(asked)


def test_a_profile_is_a_trace_of_the_steps_asked_for_and_changes_nothing(tiny, tmp_path):
    call(stage1_vae.train.main, "--config", tiny(stage1__max_steps=4), f"run_dir={tmp_path}/plain")
    recorded = tiny(stage1__max_steps=4, stage1__profile=[1, 3])
    call(stage1_vae.train.main, "--config", recorded)
    events = json.loads((tmp_path / "run" / "stage1_vae" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 2
    assert_equal_bits(*(training_tensors(tmp_path / name, "stage1_vae") for name in ("plain", "run")))
    with pytest.raises(
        InputError, match=r"stage1.profile: a first step and a later one to end at, not \[3, 3\]"
    ):
        call(stage1_vae.train.main, "--config", tiny(stage1__profile=[3, 3]))


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_trains_the_same(tiny, tmp_path, stage):
    config, (_, main) = latents_for(tiny, tmp_path), STAGES[stage]
    key, latents = stage.split("_")[0], f"stage2.latents={tmp_path}/run/latents"
    for name in ("plain", "again"):
        changed = f"{key}.gradient_checkpointing={str(name == 'again').lower()}"
        call(main, "--config", config, f"{key}.max_steps=3", changed, latents, f"run_dir={tmp_path}/{name}")
    one, other = (training_tensors(tmp_path / name, stage) for name in ("plain", "again"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("held_out", [1, 2])
def test_validation_of_stage_2_is_that_of_one_process_on_any_number(tiny, tmp_path, held_out):
    """Also with more processes than held-out latents."""
    data = {"source": "digits", "image_size": 16, "limit": 12 * held_out}
    recipe = latents_for(tiny, tmp_path, data=data)
    call(stage2_diffusion.train.main, "--config", recipe, "stage2.max_steps=2")
    one = log(tmp_path / "run", "stage2_diffusion")[-1]
    shutil.rmtree(tmp_path / "run" / "stage2_diffusion")
    command(TRAIN2, "--config", recipe, "stage2.max_steps=2", launcher=TORCHRUN)
    two = log(tmp_path / "run", "stage2_diffusion")[-1]
    scores = [key for key in one if key.startswith("val/")]
    assert len(scores) == 6 and all(two[key] == pytest.approx(one[key], rel=1e-4) for key in scores)


@torch.no_grad()
def test_a_validation_of_stage_1_is_of_held_out_images_by_the_averaged_weights(tiny):
    settings = recipe.load(tiny())
    stage = VAEStage(settings.stage1, settings.data, settings.seed, make_accelerator(settings.stage1))
    for weight in stage.raw_vae.parameters():  # those in training
        weight.fill_(float("nan"))
    x = stage.transform(stage.held_out.__getitems__(range(len(stage.held_out)))["raw"])
    vae = stage.emas["vae"].module
    expected = (vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean()
    assert float(stage.validate(iter)["val/mse"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_schedule_of_the_kl_reaches_the_training(tiny, tmp_path):
    schedule = {"kind": "linear", "warmup_steps": 4}
    call(stage1_vae.train.main, "--config", tiny(stage1__kl_schedule=schedule))
    lines = log(tmp_path / "run", "stage1_vae")
    assert [line["kl/weight"] for line in lines] == pytest.approx([0, 0.005, 0.01, 0.015, *[0.02] * 4])
    for line in lines:
        total = line["loss/l1"] + line["kl/weight"] * line.get("loss/kl", 0)
        assert line["loss/total"] == pytest.approx(total, rel=1e-5)


def test_trackers(tiny, tmp_path):
    """A resume goes on in the same wandb run; pictures reach both, at their step."""
    flags = ["tracking.with=[wandb,tensorboard]", "stage1.preview_every=2", "stage1.save_every=2"]
    for steps in (2, 4):
        nobody = {"HOME": str(tmp_path), "WANDB_SILENT": "true"}  # who is logged in at wandb stays out of it
        done = command(TRAIN1, "--config", tiny(stage1__max_steps=steps), *flags, **nobody)
        assert "no key found, logging offline" in done.stdout
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1
    names = sorted(picture.name for folder in folders for picture in folder.rglob("*.png"))
    assert [name.split("_")[1] for name in names] == ["2", "4"]
    assert list((tmp_path / "run" / "stage1_vae").rglob("events.out.tfevents*"))


def test_wandb_logs_offline_where_its_server_does_not_answer(tmp_path, monkeypatch, capsys):
    asked, begin = [], wandb.init

    def init(**options):
        asked.append(options.get("mode"))
        if asked[-1] != "offline":
            raise TimeoutError("no answer")
        return begin(**options)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for name in ("HOME", "XDG_DATA_HOME"):  # where it would leave files of its own
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(wandb, "init", init)
    accelerator = Accelerator(cpu=True, log_with=["tensorboard", "wandb"], project_dir=tmp_path)
    start_trackers(accelerator, TrackingConfig(["wandb"]), tmp_path / "run" / "stage1_vae", {})
    accelerator.end_training()
    assert asked == [None, "offline"] and len(accelerator.trackers) == 2
    assert "no answer; logging offline" in capsys.readouterr().out
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_in_the_last_step_is_measured_at_the_resume(tiny, tmp_path, monkeypatch, stage):
    config, (_, main) = latents_for(tiny, tmp_path), STAGES[stage]
    if stage == "stage1_vae":
        config = tiny(run_dir=str(tmp_path / "run1"))
    run = tmp_path / ("run1" if stage == "stage1_vae" else "run")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopFlag, "after", lambda self, step: signal.SIGTERM if step == 8 else 0)
        call(main, "--config", config)
    assert not checkpoint.is_measured(run / stage / "checkpoints")
    call(main, "--config", config)
    assert checkpoint.is_measured(run / stage / "checkpoints")
    assert any("val/" in key for key in log(run, stage)[-1])
    assert (run / stage / "previews" / "step_00000008.png").is_file()


def test_a_validation_that_a_stop_cut_off_is_made_up_for(tiny, tmp_path, monkeypatch):
    """A hurdle learns its threshold in a validation, and the next step's loss uses it."""
    sparse = np.random.default_rng(0).random((64, 1, 16, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.where(sparse > 0.8, sparse, 0))
    config = tiny(
        data={"source": str(tmp_path / "x.npy"), "channels": 1, "image_size": 16},
        stage1__model={**TINY["stage1"]["model"], "output_activation": "hurdle"},
        stage1__loss_weights={"hurdle": 1.0, "l1": 1.0, "kl": 0.02},
        stage1__validate_every=4,
    )
    call(stage1_vae.train.main, "--config", config, f"run_dir={tmp_path}/whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopFlag, "after", lambda self, step: signal.SIGTERM if step == 4 else 0)
        call(stage1_vae.train.main, "--config", config)
    call(stage1_vae.train.main, "--config", config)
    for read in (training_tensors, averaged):
        assert_equal_bits(*(read(tmp_path / name, "stage1_vae") for name in ("whole", "run")))
    measured = [
        [(line["step"], line["val/l1"]) for line in log(tmp_path / name, "stage1_vae") if "val/l1" in line]
        for name in ("whole", "run")
    ]
    assert measured[0] == measured[1] and [step for step, _ in measured[0]] == [4, 8]


def test_bf16_trains(tiny, tmp_path):
    config = tiny(stage1__mixed_precision="bf16", stage1__max_steps=20, stage1__optim__lr=3e-3)
    call(stage1_vae.train.main, "--config", config)
    lines = log(tmp_path / "run", "stage1_vae")
    assert lines[-1]["loss/l1"] < 0.8 * lines[0]["loss/l1"]
    assert all(v.dtype == torch.float32 for k, v in training_tensors(tmp_path / "run", "stage1_vae").items())


def test_compiled_names_do_not_reach_a_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", self._call_impl)
    )
    call(stage1_vae.train.main, "--config", tiny(stage1__max_steps=1), "stage1.compile=true")
    assert not [k for k in training_tensors(tmp_path / "run", "stage1_vae") if "_orig_mod" in k]


def test_the_launcher_of_accelerate_works_from_another_folder(tiny, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    command(TRAIN1, "--config", tiny(stage1__max_steps=1), launcher=launcher, cwd=tmp_path)
    assert log(tmp_path / "run", "stage1_vae")[-1]["step"] == 1


def test_bare_commands_take_the_digits(tmp_path):
    process = subprocess.Popen(
        [sys.executable, TRAIN1], cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    assert str(ROOT / "configs" / "digits.yaml") in process.stdout.readline()
    process.kill()
    process.communicate()
