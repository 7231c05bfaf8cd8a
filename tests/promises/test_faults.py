"""A fault is put in, and the promise is kept: crashes, full disks, signals, numbers that are none, bad data,
long runs.

The table in README.md beside this file names these tests by what they hold.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import shared.generate
import stage1_vae.encode
import stage1_vae.train
import stage2_diffusion.train
from shared import config, disk
from shared.config import InputError
from shared.data import batches, latents, sources, splits
from shared.data.config import DataConfig
from shared.training import checkpoint, engine
from tests.conftest import (
    ENCODE,
    ROOT,
    STARTED,
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

MAINS = {"stage1_vae": stage1_vae.train.main, "stage2_diffusion": stage2_diffusion.train.main}


def steps_of(run: Path, stage="stage1_vae") -> list[str]:
    return sorted(p.name for p in (run / stage / "checkpoints").iterdir())


def scripted(tmp_path, text: str) -> Path:
    """A program that changes one thing and then runs stage 1's train command."""
    path = tmp_path / "scripted.py"
    path.write_text(f"{text}\nfrom stage1_vae import train\ntrain.config.run(train.main)\n")
    return path


# ---------------------------------------------------------------- crash and disk

MOMENTS = """
import os, random, signal, sys, time
import shared.training.engine, stage1_vae.stage  # once: the children are forked
from pathlib import Path
from shared import disk
from shared.training import checkpoint
from stage1_vae import train

def started():
    if (child := os.fork()) == 0:
        try:
            train.main()
        finally:
            os._exit(0)
    return child

def killed(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoint.newest(folder)
    return checkpoint.step_of(found) if found else -1

folder = Path(sys.argv[3].removeprefix("run_dir=")) / "stage1_vae" / "checkpoints"
begun, first = time.monotonic(), started()
while not any(path.name >= "step_00000003" for path in folder.glob("step_*")):
    time.sleep(0.01)
way = time.monotonic() - begun  # of this machine, from the start to the first steps
rng, before = random.Random(0), killed(first)
for moment in range(20):
    child = started()
    time.sleep(rng.uniform(0.2, 2) * way)
    step = killed(child)
    assert step >= before, f"{step} after {before}"
    before = step
assert before > 3, "it never came far enough to be interrupted"
print("REACHED", before)
"""


@pytest.mark.slow
def test_kill_9_at_20_random_moments(tiny, tmp_path):
    recipe = tiny(stage1__max_steps=100_000, stage1__save_every=1)
    (tmp_path / "moments.py").write_text(MOMENTS)
    done = command(tmp_path / "moments.py", "--config", recipe, f"run_dir={tmp_path}/killed", timeout=300)
    reached = int(done.stdout.rsplit("REACHED", 1)[1])
    for name in ("killed", "undisturbed"):
        command(
            TRAIN1,
            "--config",
            recipe,
            f"run_dir={tmp_path}/{name}",
            f"stage1.max_steps={reached + 5}",
            timeout=300,
        )
    assert_equal_bits(
        *(training_tensors(tmp_path / name, "stage1_vae") for name in ("killed", "undisturbed"))
    )


class Death(BaseException):
    """What no handler catches: the process is gone."""


class Reaper:
    """Dies at the n-th operation on files below a folder (Python's audit events), when it is told to."""

    def __init__(self):
        self.folder, self.left = None, None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.left is None or event not in (
            "open",
            "os.rename",
            "os.mkdir",
            "os.chmod",
            "os.remove",
            "os.rmdir",
        ):
            return
        if any(
            str(a).startswith(str(self.folder)) for a in arguments if isinstance(a, (str, bytes, os.PathLike))
        ):
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Death(event)

    def kills(self, folder: Path, operation: int, action) -> bool:
        """Whether the action died; False: it was over before it came to that operation."""
        self.folder, self.left = folder, operation
        try:
            action()
        except Death:
            return True
        finally:
            self.left = None
        return False


@pytest.fixture(scope="module")
def reaper():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "_use_fd_functions", False)  # a folder is removed by names that an audit tells
        yield Reaper()


def write_checkpoint(parent: Path, step: int, keep=2, score=None) -> Path:
    from shared.sampling.transforms import LatentCodec

    tensors = {"w": torch.full((4,), float(step))}
    return checkpoint.save(parent, step, {"codec": LatentCodec([[[0.0]]], [[[1.0]]])}, tensors, keep, score)


def test_death_between_any_two_operations_of_a_save(tmp_path, reaper):
    """Also while older checkpoints are being rotated away."""
    for operation in range(200):
        parent = tmp_path / str(operation)
        for step in (1, 2, 3):
            write_checkpoint(parent, step)
        died = reaper.kills(parent, operation, lambda folder=parent: write_checkpoint(folder, 4))
        assert checkpoint.step_of(checkpoint.newest(parent)) in (3, 4)
        write_checkpoint(parent, 5)
        assert checkpoint.step_of(checkpoint.newest(parent)) == 5 and not list(parent.glob(".tmp-*"))
        assert len(list(parent.glob("step_*"))) == 2
        if not died:
            break
    assert 10 < operation < 199


@pytest.mark.parametrize("others", [(1, 2), ()])
def test_death_between_any_two_operations_of_saving_a_step_again(tmp_path, reaper, others):
    """As after the validation of a training that was stopped in its last step, be it the only checkpoint."""
    for operation in range(200):
        parent = tmp_path / str(operation)
        for step in (*others, 3):
            write_checkpoint(parent, step)
        died = reaper.kills(parent, operation, lambda folder=parent: write_checkpoint(folder, 3, score=0.5))
        assert checkpoint.step_of(checkpoint.recover(parent)) == 3
        write_checkpoint(parent, 5)
        assert checkpoint.step_of(checkpoint.newest(parent)) == 5 and not list(parent.glob(".tmp-*"))
        if not died:
            break
    assert 10 < operation < 199


def test_death_between_any_two_operations_of_an_export(tmp_path, reaper):
    """An export that dies, and then one that finds the disk full: the older pipeline or the newer one is
    there, whole."""

    def full(folder):
        raise OSError(28, "No space left on device")

    for operation in range(100):
        final = tmp_path / str(operation) / "pipeline"
        disk.replace_folder(final, lambda folder: (folder / "a").write_text("old"))
        write = lambda folder: (folder / "a").write_text("new")  # noqa: E731
        died = reaper.kills(final.parent, operation, lambda f=final, w=write: disk.replace_folder(f, w))
        with pytest.raises(InputError, match="No space left"):
            disk.replace_folder(final, full)
        assert disk.faults(final) == [] and (final / "a").read_text() in ("old", "new")
        assert not list(final.parent.glob(".tmp-*"))
        if not died:
            break
    assert 8 < operation < 99


def limited(bytes_: int):
    """For a child process: no file may grow beyond `size` bytes (errors as on a full disk, not a signal)."""

    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    return apply


def refused_by_disk(limit: int, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        preexec_fn=limited(limit),
        env=clean_environment(),
        capture_output=True,
        text=True,
        cwd="/",
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, but for the note of when shards were touched."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != latents.VERIFIED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_disk_that_refuses_a_save_a_cache_or_an_export(tiny, trained, tmp_path):
    run, recipe = tmp_path / "run", tiny()
    shutil.copytree(trained, run)
    before = contents(run / "stage1_vae" / "checkpoints")
    error = refused_by_disk(20_000, TRAIN1, "--config", recipe, "stage1.max_steps=12")
    assert "not saved" in error and str(run) in error
    assert contents(run / "stage1_vae" / "checkpoints") == before

    before = contents(run / "pipeline")
    assert "pipeline: not saved" in refused_by_disk(20_000, TRAIN2, "--config", recipe)
    assert contents(run / "pipeline") == before

    shutil.rmtree(run / "latents")
    assert "not saved" in refused_by_disk(20_000, ENCODE, "--run", run)
    call(stage1_vae.encode.main, "--run", run)
    assert contents(run / "latents") == contents(trained / "latents")
    assert not list(run.rglob(".tmp-*"))

    call(stage2_diffusion.train.main, "--config", recipe)
    assert not disk.faults(run / "pipeline")
    for place in (run, tmp_path / "whole"):
        call(stage1_vae.train.main, "--config", recipe, "stage1.max_steps=12", f"run_dir={place}")
    assert_equal_bits(*(training_tensors(place, "stage1_vae") for place in (run, tmp_path / "whole")))


@pytest.mark.parametrize("operation", ["write_text", "replace", "copyfile"])
def test_a_disk_that_fills_up_while_the_cache_is_finished(trained, tmp_path, monkeypatch, operation):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "latents" / "manifest.json").unlink()

    place = shutil if operation == "copyfile" else Path
    real = getattr(place, operation)

    def full(path, *arguments, **options):
        if operation == "copyfile" or "manifest" in Path(path).name:
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, operation, full)
        with pytest.raises(InputError, match="No space left on device"):
            call(stage1_vae.encode.main, "--run", run)
    assert latents.read_manifest(run / "latents") is None and not list(run.rglob(".tmp-*"))
    call(stage1_vae.encode.main, "--run", run)
    assert contents(run / "latents") == contents(trained / "latents")


def test_any_other_refusal_of_the_disk_is_one_line(capsys):
    def main():
        raise OSError(28, "No space left on device", "/data/metrics.jsonl")

    with pytest.raises(SystemExit) as ended:
        config.run_and_exit(main)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(
        "error: /data/metrics.jsonl: No space left on device;"
    )


LATE = """
import atexit, os, sys
from shared import config
class Late:
    def __del__(self):
        os.abort()  # as a thread of a library does that wakes up while Python takes its modules apart
late = Late()
atexit.register(lambda: print("said last"))
def main():
    {end}
config.run(main)
"""


@pytest.mark.parametrize(
    "end, code", [("pass", 0), ("sys.exit(143)", 143), ("raise config.InputError('wrong')", 2)]
)
def test_nothing_that_comes_after_a_command_changes_its_status(end, code, tmp_path):
    (script := tmp_path / "late.py").write_text(LATE.format(end=end))
    done = command(script, check=False)
    assert done.returncode == code and done.stdout == "said last\n"


DAMAGES = {
    "missing": None,
    "empty": lambda b: b"",
    "half": lambda b: b[: len(b) // 2],
    "99 %": lambda b: b[: len(b) * 99 // 100],
    "flipped": lambda b: b[: len(b) // 3] + bytes([b[len(b) // 3] ^ 1]) + b[len(b) // 3 + 1 :],
}


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink() if how == "missing" else path.write_bytes(DAMAGES[how](content))


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("stage", MAINS)
def test_every_damaged_file_of_a_checkpoint_is_noticed(trained, tmp_path, capsys, stage, how):
    original = trained / stage / "checkpoints"
    older, newer = sorted(original.iterdir())
    assert len(files_of(newer)) >= 6
    for number, file in enumerate(files_of(newer)):
        parent = tmp_path / str(number)
        shutil.copytree(original, parent)
        damaged(parent / newer.name / file, how)
        assert checkpoint.newest(parent) == parent / older.name
        assert f"{newer.name} is broken" in capsys.readouterr().out


def damaged_copies(original: Path, tmp_path: Path, how: str):
    """The name of each file below a folder, and a copy of the folder in which that file is damaged."""
    for number, file in enumerate(files_of(original)):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        damaged(folder / file, how)
        yield file, folder


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damaged_file_of_a_named_pipeline_is_an_error(trained, tmp_path, how):
    for file, folder in damaged_copies(trained / "pipeline", tmp_path, how):
        with pytest.raises(InputError, match=r"model_index|restore it|not a run folder") as caught:
            call(shared.generate.main, "--run", folder, "--num-images", "1")
        assert str(folder) in str(caught.value) and not (tmp_path / "samples").exists()
        assert file in str(caught.value) or file in (disk.MANIFEST, "model_index.json")


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damaged_file_of_a_cache_is_an_error(trained, tmp_path, how):
    for file, folder in damaged_copies(trained / "latents", tmp_path, how):
        # not needed for reading: one is compared where images are at hand, the other only saves time
        if file in ("fingerprint.json", latents.VERIFIED):
            continue
        with pytest.raises(InputError, match=str(folder)) as caught:
            latents.verify(folder)
        assert file in str(caught.value) or Path(file).name.upper() == disk.MANIFEST.upper()


def test_a_training_goes_back_to_the_last_good_one_and_keeps_it(tiny, tmp_path, capsys):
    """Two broken newer checkpoints must not push the good ones out when the next is saved."""
    recipe = tiny(stage1__save_every=2, stage1__keep=4)
    call(stage1_vae.train.main, "--config", recipe)
    parent = tmp_path / "run" / "stage1_vae" / "checkpoints"
    for step in (6, 8):
        damaged(parent / f"step_{step:08d}" / "training.safetensors", "flipped")
    other = ["stage1.keep=2", "stage1.max_steps=5", "stage1.save_every=5", "stage1.validate_every=99"]
    call(stage1_vae.train.main, "--config", recipe, *other)
    assert "going back to an older one" in capsys.readouterr().out
    assert [n for n in steps_of(tmp_path / "run") if n.startswith("step")] == [
        "step_00000004",
        "step_00000005",
    ]
    assert [n for n in steps_of(tmp_path / "run") if not n.startswith("step")] == [
        "broken_step_00000006",
        "broken_step_00000008",
    ]


def test_only_broken_checkpoints_stop_every_command(tiny, trained, tmp_path):
    run, recipe = tmp_path / "run", tiny()
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("pipeline"))
    for stage in MAINS:
        for folder in (run / stage / "checkpoints").iterdir():
            damaged(folder / "training.json", "missing")
    before = contents(run) | {"recipe.yaml": None}  # which says how long the training shall be
    for main, flags in (
        (stage1_vae.train.main, ["--config", recipe, "stage1.max_steps=99"]),
        (stage2_diffusion.train.main, ["--config", recipe, "stage2.max_steps=99"]),
        (stage1_vae.encode.main, ["--run", run]),
        (shared.generate.main, ["--run", run]),
    ):
        with pytest.raises(InputError, match="every checkpoint is broken"):
            call(main, *flags)
    assert contents(run) | {"recipe.yaml": None} == before


def test_the_best_checkpoint_is_kept(tmp_path):
    (tmp_path / "step_mine").mkdir()
    os.symlink(tmp_path / "step_mine", tmp_path / "step_00000000")
    for step, score in enumerate([0.5, 0.2, None, 0.4, 0.3, None], start=1):
        write_checkpoint(tmp_path, step, keep=2, score=score)
    names = ["step_00000000", "step_00000002", "step_00000005", "step_00000006", "step_mine"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_run_keeps_the_checkpoint_that_validated_best(tiny, tmp_path):
    recipe = tiny(
        stage1__save_every=1,
        stage1__validate_every=1,
        stage1__max_steps=12,
        stage1__optim={"name": "adamw", "lr": 0.05},
    )
    call(stage1_vae.train.main, "--config", recipe)
    totals = {line["step"]: line["val/total"] for line in log(tmp_path / "run", "stage1_vae")}
    best = min(totals, key=totals.get)
    assert set(steps_of(tmp_path / "run")) == {f"step_{step:08d}" for step in (best, 11, 12)}


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("stops", "changes"),
    [
        ((4, 12), {"batch_size": 29}),  # at the end of an epoch of two steps
        ((9, 11, 16), {}),  # twice within one epoch
        ((3, 7), {"grad_accumulation": 4}),
        (
            (2, 9),
            {
                "ema": {"decay": 0.9},
                "optim": {"name": "adamw", "lr": 1e-3, "schedule": "linear", "warmup_steps": 5},
            },
        ),
        ((5, 8), {"mixed_precision": "bf16"}),
        ((4, 9), {"optim": {"name": "muon", "lr": 1e-3, "schedule": "cosine"}}),
    ],
)
@pytest.mark.parametrize("stage", MAINS)
def test_resume_is_bit_equal(tiny, trained, tmp_path, monkeypatch, stage, stops, changes):
    """Stopped by a SIGTERM in each of the steps `stops`, at the last of which the training would have ended
    anyway."""
    key = stage.split("_")[0]
    recipe = tiny(
        **{f"{key}__{name}": value for name, value in changes.items()},
        stage2__latents=str(trained / "latents"),
    )
    command_line = ["--config", recipe, f"{key}.max_steps={stops[-1]}", f"{key}.validate_every=1000"]
    call(MAINS[stage], *command_line, f"run_dir={tmp_path}/whole")
    original = engine._micro_step
    for stop in stops:

        def signalled(stage, batch, config, seed, step, *rest, stop=stop):
            if step + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(stage, batch, config, seed, step, *rest)

        monkeypatch.setattr(engine, "_micro_step", signalled)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            call(MAINS[stage], *command_line, f"run_dir={tmp_path}/parts")
    assert_equal_bits(*(training_tensors(tmp_path / name, stage) for name in ("whole", "parts")))
    assert_equal_bits(*(averaged(tmp_path / name, stage) for name in ("whole", "parts")))
    whole, parts = (log(tmp_path / name, stage) for name in ("whole", "parts"))
    assert [
        {k: v for k, v in line.items() if not k.startswith(("val/", "train/"))} for line in whole
    ] == parts


def test_resume_with_dropout_is_bit_equal(tiny, trained, tmp_path):
    config = tiny(stage2__unet__dropout=0.3, stage2__latents=str(trained / "latents"))
    call(stage2_diffusion.train.main, "--config", config, f"run_dir={tmp_path}/whole")
    for steps in (3, 8):
        call(stage2_diffusion.train.main, "--config", config, f"stage2.max_steps={steps}")
    whole, parts = (training_tensors(tmp_path / name, "stage2_diffusion") for name in ("whole", "run"))
    assert_equal_bits(whole, parts)


def test_resume_with_loader_processes_is_bit_equal(tiny, tmp_path):
    write_images(tmp_path / "photos", 30)
    recipe = tiny(data={"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16})
    call(stage1_vae.train.main, "--config", recipe, f"run_dir={tmp_path}/whole", "data.num_workers=0")
    for steps in (3, 8):
        call(stage1_vae.train.main, "--config", recipe, f"stage1.max_steps={steps}", "data.num_workers=2")
    assert_equal_bits(*(training_tensors(tmp_path / name, "stage1_vae") for name in ("whole", "run")))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What 60 steps of stage 1 on two processes come to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    quick = ["stage1.max_steps=60", "stage1.save_every=60"]
    command(TRAIN1, "--config", folder / "tiny.yaml", f"run_dir={folder}/run", *quick, launcher=TORCHRUN)
    return training_tensors(folder / "run", "stage1_vae")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the processes")
def test_resume_on_two_processes_is_bit_equal(tiny, tmp_path, undisturbed):
    recipe = tiny(stage1__max_steps=60, stage1__save_every=10)
    process = started(recipe, TRAIN1, TORCHRUN, start_new_session=True)
    wait_for(tmp_path / "run" / "stage1_vae" / "checkpoints" / "step_00000010", process)
    for worker in processes_of(tmp_path / "run"):  # which torchrun put into sessions of their own, and itself
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    process.wait()
    assert "step_00000060" not in steps_of(tmp_path / "run")
    command(TRAIN1, "--config", recipe, launcher=TORCHRUN)
    assert_equal_bits(training_tensors(tmp_path / "run", "stage1_vae"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "processes"), [("stage1_vae", 3), ("stage1_vae", 4), ("stage2_diffusion", 3)]
)
def test_resume_on_more_processes_is_bit_equal(tiny, trained, tmp_path, stage, processes):
    """A sum over three depends on its order, and the first backward pass changes the order of gradients."""
    launcher = tuple(str(processes) if word == "2" else word for word in TORCHRUN)
    recipe = tiny(
        stage1__batch_size=12,
        stage1__loss_weights={"l1": 1.0, "kl": 0.02, "adversarial": 0.05},
        stage1__discriminator={"channels": [8, 16], "start_step": 5, "ramp_steps": 2},
        stage2__batch_size=12,
        stage2__latents=str(trained / "latents"),
    )
    key, script = ("stage1", TRAIN1) if stage == "stage1_vae" else ("stage2", TRAIN2)
    command(script, "--config", recipe, f"run_dir={tmp_path}/whole", launcher=launcher)
    for steps in (5, 8):
        command(script, "--config", recipe, f"{key}.max_steps={steps}", launcher=launcher)
    assert_equal_bits(*(training_tensors(tmp_path / name, stage) for name in ("whole", "run")))


@pytest.mark.parametrize(
    "kl",
    [{}, {"stage1__kl_schedule__free_bits": 0.004, "stage1__loss_weights": {"l1": 1.0, "kl": 1.0}}],
    ids=["a mean", "a floor under that of the whole batch"],
)
def test_two_processes_one_and_two_again(tiny, tmp_path, kl):
    """The number of processes may change at every resume: the same batches and noise, losses within 1e-5."""
    data = {
        "source": "digits",
        "image_size": 16,
        "limit": 336,
        "val_fraction": 0.5,
    }  # validated in 21 batches, an uneven number
    recipe = tiny(data=data, stage1__validate_every=4, **kl)
    call(stage1_vae.train.main, "--config", recipe, f"run_dir={tmp_path}/one", "stage1.max_steps=12")
    command(TRAIN1, "--config", recipe, "stage1.max_steps=4", launcher=TORCHRUN)
    call(stage1_vae.train.main, "--config", recipe, "stage1.max_steps=8")
    command(TRAIN1, "--config", recipe, "stage1.max_steps=12", launcher=TORCHRUN)
    one, parts = (log(tmp_path / name, "stage1_vae") for name in ("one", "run"))
    assert len(one) == len(parts) == 12
    for a, b in zip(one, parts, strict=True):
        assert a.keys() == b.keys() and a["loss/total"] == pytest.approx(b["loss/total"], abs=1e-5)
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in a if key.startswith("val/"))


# ---------------------------------------------------------------- signals and processes


def processes_of(run: Path) -> list[int]:
    """The processes whose command line names a run folder's recipe."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if str(run.parent / "tiny.yaml") in (entry / "cmdline").read_bytes().decode(errors="ignore"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")


ENDLESS = {"stage1__max_steps": 100_000, "stage1__save_every": 50_000, "stage1__validate_every": 50_000}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the processes")
@pytest.mark.parametrize(
    ("launcher", "number", "to"),
    [
        (TORCHRUN, signal.SIGTERM, "launcher"),
        (TORCHRUN, signal.SIGUSR1, "launcher"),
        (TORCHRUN, signal.SIGKILL, "launcher"),
        (TORCHRUN, signal.SIGTERM, "worker"),
        (TORCHRUN, signal.SIGUSR1, "worker"),
        (ACCELERATE, signal.SIGTERM, "launcher"),
        (ACCELERATE, signal.SIGKILL, "launcher"),
    ],
)
def test_a_signal_saves_on_all_ranks_and_leaves_no_orphan(tiny, tmp_path, launcher, number, to):
    run, recipe = tmp_path / "run", tiny(**ENDLESS)
    process = started(recipe, TRAIN1, launcher)
    wait_for(run / "stage1_vae" / "metrics.jsonl", process)
    target = process.pid if to == "launcher" else max(processes_of(run))
    os.kill(target, number)
    process.wait(timeout=40)
    deadline = time.monotonic() + 30
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run), "a worker was left behind"
    saved = checkpoint.newest(run / "stage1_vae" / "checkpoints")
    assert saved, (tmp_path / "started.log").read_text()
    assert log(run, "stage1_vae")[-1]["step"] == checkpoint.step_of(saved)


def training_of_launch_sh(tiny, folder):
    """A run folder, and the launch.sh that trains its stage 1."""
    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    with open(folder / "started.log", "w") as output:
        process = subprocess.Popen(
            [ROOT / "launch.sh", tiny(**ENDLESS)],
            env=clean_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=hearing,
        )
    STARTED.append(process)
    wait_for(folder / "run" / "stage1_vae" / "metrics.jsonl", process)
    return folder / "run", process


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_launch_sh_reaches_its_step(tiny, tmp_path, number):
    """The step saves, launch.sh waits for it and ends as it did, before the next step."""
    run, process = training_of_launch_sh(tiny, tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=40) == 128 + number, (tmp_path / "started.log").read_text()
    assert not processes_of(run) and not (run / "latents").exists()
    assert checkpoint.newest(run / "stage1_vae" / "checkpoints")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the processes")
def test_launch_sh_killed_leaves_no_training_behind(tiny, tmp_path):
    run, process = training_of_launch_sh(tiny, tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 40
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run), "the training goes on"
    assert checkpoint.newest(run / "stage1_vae" / "checkpoints")


def test_two_trainers_in_one_folder(tiny, tmp_path):
    """The second ends with 2 and names the first; what a killed one held is free at once."""
    run, recipe = tmp_path / "run", tiny(**ENDLESS)
    first = started(recipe, TRAIN1)
    wait_for(run / "stage1_vae" / "metrics.jsonl", first)
    second = command(TRAIN1, "--config", recipe, check=False)
    assert second.returncode == 2 and f"process {first.pid} on " in second.stderr
    assert command(ENCODE, "--run", run, check=False).returncode == 2
    first.kill()
    first.wait()
    done = command(TRAIN1, "--config", recipe, "stage1.max_steps=4")
    assert "stage 1 done" in done.stdout


IN_VALIDATION = """
import os, signal
from stage1_vae import stage
some, calls = stage.VAEStage._pixels, []
def interrupted(self, part, rows):
    calls.append(rows)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(calls) < 3, "the validation went on"
    return some(self, part, rows)
stage.BATCH, stage.VAEStage._pixels = 2, interrupted
"""


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two processes"])
def test_a_signal_in_the_middle_of_a_validation(tiny, tmp_path, launcher):
    recipe = tiny(
        data={"source": "digits", "image_size": 16, "limit": 64, "val_fraction": 0.3},
        stage1__validate_every=3,
    )
    done = command(scripted(tmp_path, IN_VALIDATION), "--config", recipe, launcher=launcher, check=False)
    assert "stopped at step 3, checkpoint saved" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (1 if launcher else 143)
    assert (
        steps_of(tmp_path / "run") == ["step_00000003"]
        and "val/psnr" not in log(tmp_path / "run", "stage1_vae")[-1]
    )


HANGING_LOADER = """
import os, time
from torch.utils.data import get_worker_info
from shared.data import arrays
from shared.training import engine
read, step_ = arrays.ArraySource.read, engine._micro_step
def hanging(self, indices):
    if get_worker_info() and os.path.exists(r"{mark}"):
        time.sleep(1000)
    return read(self, indices)
def marked(stage, batch, config, seed, step, *rest):
    if step == 3:
        open(r"{mark}", "w").close()
        os.kill(os.getpid(), 15)
    return step_(stage, batch, config, seed, step, *rest)
arrays.ArraySource.read, engine._micro_step = hanging, marked
"""


def test_a_loader_process_that_hangs_does_not_keep_a_stopped_training(tiny, tmp_path):
    recipe = tiny(
        data={"source": "digits", "image_size": 16, "limit": 64, "num_workers": 1}, stage1__max_steps=100
    )
    script = scripted(tmp_path, HANGING_LOADER.format(mark=tmp_path / "mark"))
    done = command(script, "--config", recipe, check=False)
    assert done.returncode == 143 and steps_of(tmp_path / "run") == ["step_00000004"]


KEPT_LOADER = """
from shared.training import engine
kept, batches = [], engine.batches
engine.batches = lambda *a: kept.append(batches(*a)) or kept[-1]
"""


def test_loader_processes_never_keep_a_program_from_ending(tiny, tmp_path):
    """They leave signals to the trainer, so Python's own farewell to those that nobody closed would wait for
    ever."""
    recipe = tiny(data={"source": "digits", "image_size": 16, "limit": 64, "num_workers": 2})
    done = command(scripted(tmp_path, KEPT_LOADER), "--config", recipe)
    assert "Traceback" not in done.stderr


def test_a_signal_while_encoding_or_sampling_leaves_nothing_half_done(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "latents")
    call(shared.generate.main, "--run", run / "pipeline", "--num-images", "3")
    samples = contents(run / "samples")
    script = tmp_path / "scripted.py"
    script.write_text(
        "import os, signal, sys\n"
        "from shared import config, generate\n"
        "from shared.data import latents, shard\n"
        "from shared.show import grids\n"
        "from stage1_vae import encode\n"
        "def then_die(f):\n"
        "    def g(*a, **k):\n"
        "        f(*a, **k)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return g\n"
        "latents.SHARD, shard.write = 16, then_die(shard.write)\n"
        "grids.grid = then_die(grids.grid)\n"
        "config.run({'encode': encode, 'generate': generate}[sys.argv.pop(1)].main)\n"
    )
    for name, flags in (("encode", ["--run", run]), ("generate", ["--run", run / "pipeline", "--seed", "1"])):
        assert command(script, name, *flags, check=False).returncode == -signal.SIGTERM
    assert (
        len(list((run / "latents" / "train").iterdir())) == 1
        and latents.read_manifest(run / "latents") is None
    )
    assert {k: v for k, v in contents(run / "samples").items() if not k.startswith(".tmp-")} == samples


DIES_ONCE = """
import os, pathlib
from shared.training import engine
mark, step_ = pathlib.Path(r"{mark}"), engine._micro_step
def dying(stage, batch, config, seed, step, *rest):
    if step == 6 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os._exit(1)
    return step_(stage, batch, config, seed, step, *rest)
engine._micro_step = dying
"""


def test_a_rank_that_dies_is_restarted_and_the_end_is_bit_equal(tiny, tmp_path, undisturbed):
    recipe, mark = tiny(stage1__max_steps=60, stage1__save_every=2), tmp_path / "died"
    restarting = (*TORCHRUN[:-1], "--max-restarts", "2", "--")
    done = command(scripted(tmp_path, DIES_ONCE.format(mark=mark)), "--config", recipe, launcher=restarting)
    assert mark.exists() and "resuming from" in done.stdout
    assert_equal_bits(training_tensors(tmp_path / "run", "stage1_vae"), undisturbed)


# ---------------------------------------------------------------- numbers

NAN_ON_ONE_RANK = """
import hashlib, os, torch
from shared.training import engine, state
step_, fit = engine._micro_step, engine.fit
def poisoned(stage, batch, config, seed, step, *rest):
    if step in (3, 5) and os.environ["RANK"] == "1":
        batch["raw"] = batch["raw"].float() * float("nan" if step == 3 else "inf")
    return step_(stage, batch, config, seed, step, *rest)
def spied(stage, *a):
    fit(stage, *a)
    found = b"".join(v.numpy().tobytes() for v in state.tensors(stage).values())
    digest = hashlib.sha256(found).hexdigest()
    open(r"{place}/rank" + os.environ["RANK"], "w").write(digest)
engine._micro_step, engine.fit = poisoned, spied
"""


def test_a_bad_batch_on_one_rank_is_skipped_by_all(tiny, tmp_path):
    script = scripted(tmp_path, NAN_ON_ONE_RANK.format(place=tmp_path))
    command(script, "--config", tiny(), launcher=TORCHRUN)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    assert [line["skipped/vae"] for line in log(tmp_path / "run", "stage1_vae")] == [0, 0, 0, 1, 0, 1, 0, 0]
    assert all(
        tensor.isfinite().all() for tensor in training_tensors(tmp_path / "run", "stage1_vae").values()
    )


def test_ten_bad_steps_in_a_row_stop_and_say_which(tiny, tmp_path, monkeypatch):
    """After good steps, with a save at every step: the last checkpoint is finite, and the message names what
    to look at."""
    x = np.random.default_rng(0).random((64, 16, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    transform = {"kind": "range", "low": 0.0, "high": 1.0}
    recipe = tiny(
        data={"source": str(tmp_path / "x.npy"), "image_size": 16, "value_transform": transform},
        stage1__save_every=1,
    )
    call(stage1_vae.train.main, "--config", recipe, "stage1.max_steps=5")
    original = engine._micro_step

    def poisoned(stage, batch, *rest):
        return original(stage, batch | {"raw": batch["raw"] * float("nan")}, *rest)

    monkeypatch.setattr(engine, "_micro_step", poisoned)
    rhythm = ["stage1.max_steps=40", "stage1.preview_every=99", "stage1.validate_every=99"]
    with pytest.raises(
        InputError, match=r"steps 6 to 15: no finite gradient .*l1, kl, total; its images: \d+, "
    ) as caught:
        call(stage1_vae.train.main, "--config", recipe, *rhythm)
    source = sources.open_source(DataConfig(channels=1, source=str(tmp_path / "x.npy"), image_size=16))
    train, _ = splits.split(source, DataConfig(channels=1, image_size=16, val_fraction=0.1))
    assert f"images: {', '.join(map(str, train.indices[batches.BatchOrder(len(train), 8, 0)(14)]))})" in str(
        caught.value
    )
    tensors = training_tensors(tmp_path / "run", "stage1_vae")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    good = write_checkpoint(tmp_path, 1)
    with pytest.raises(InputError, match="w is not finite"):
        checkpoint.save(tmp_path, 2, {}, {"w": torch.tensor([1.0, float("nan")])}, 2)
    assert checkpoint.newest(tmp_path) == good and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_log_variance_never_overflows(precision):
    from stage1_vae.losses import kl_term
    from stage1_vae.model import DeepVAE

    vae = DeepVAE(1, 16, channels=(8, 16), latent_shape=(4, 4, 4), head="conv")
    with torch.no_grad():
        vae.to_moments.bias.fill_(1e6)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        logits, mean, logvar = vae(torch.zeros(2, 1, 16, 16), noise=torch.ones(2, 4, 4, 4))
        term = kl_term(torch.zeros_like(mean), logvar, 0.0, None)
    assert (
        logvar.max() == 20 and logvar.exp().isfinite().all() and logits.isfinite().all() and term.isfinite()
    )


# ---------------------------------------------------------------- data


def zoo(folder: Path) -> dict[str, bool]:
    """Images of every bad and every odd kind, and whether each can be read."""
    import io

    write_images(folder, 30)
    good = (folder / "0.png").read_bytes()

    def encoded(image: Image.Image, kind: str, **options) -> bytes:
        image.save(buffer := io.BytesIO(), kind, **options)
        return buffer.getvalue()

    noise = np.random.default_rng(1).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the size that a PNG claims in its header
    files = {
        "zero-bytes.png": (b"", False),
        "truncated.png": (good[: len(good) // 2], False),
        "page.jpg": (b"<!doctype html><title>404</title>", False),
        "bomb.png": (bytes(bomb), False),
        "16-bit.png": (encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"), True),
        "palette.png": (encoded(Image.fromarray(noise[..., :3]).convert("P"), "PNG"), True),
        "cmyk.jpg": (encoded(Image.fromarray(noise, "CMYK"), "JPEG"), True),
        "rgba.png": (encoded(Image.fromarray(noise), "PNG"), True),
        "grey.png": (encoded(Image.fromarray(noise[..., 0]), "PNG"), True),
        "turned.jpg": (encoded(Image.fromarray(noise[..., :3]), "JPEG", exif=exif), True),
        "one-pixel.png": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), True),
        "name.JPEG": (encoded(Image.new("RGB", (9, 9)), "JPEG"), True),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".DS_Store").write_bytes(b"\x00\x01")
    return {name: readable for name, (_, readable) in files.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_zoo_of_bad_images(tiny, tmp_path, workers):
    kinds = zoo(tmp_path / "zoo")
    folder = {"source": str(tmp_path / "zoo"), "channels": 3, "image_size": 16, "num_workers": workers}
    done = command(TRAIN1, "--config", tiny(data=folder | {"max_bad_fraction": 0.1}), "stage1.max_steps=11")
    warned = [line for line in done.stdout.splitlines() if "not a readable image" in line]
    assert {n for n in kinds if any(n in line for line in warned)} == {
        n for n, readable in kinds.items() if not readable
    }
    assert "38 images" in done.stdout  # of 42, four are held out: everything but the text and the dot-file
    done = command(
        TRAIN1,
        "--config",
        tiny(data=folder | {"max_bad_fraction": 0.05}),
        f"run_dir={tmp_path}/two",
        check=False,
    )
    assert (
        done.returncode == 2
        and "data.max_bad_fraction allows 0.05" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.full((8, 16, 16), np.nan, np.float32), "NaN"),
        (np.where(np.eye(16) > 0, np.inf, 0).astype(np.float32)[None].repeat(8, 0), "NaN or infinite"),
        (np.zeros((8, 16)), "data.channels"),
        (np.array([{"a": 1}] * 8, dtype=object), "x.npy"),
        (np.zeros((0, 16, 16)), "at least 2"),
        (np.zeros((8, 16, 16)), "nothing to learn from"),
        (np.array([np.zeros((16, 16)), np.zeros((8, 8))], dtype=object), "x.npy"),
    ],
    ids=["NaN", "Inf", "rank", "object", "empty", "constant", "mixed shapes"],
)
def test_a_zoo_of_bad_arrays(tiny, tmp_path, x, words):
    np.save(tmp_path / "x.npy", x, allow_pickle=x.dtype == object)
    with pytest.raises(InputError, match=words):
        call(
            stage1_vae.train.main,
            "--config",
            tiny(data={"source": str(tmp_path / "x.npy"), "image_size": 16}),
        )
    assert not (tmp_path / "run").exists()


def test_one_image_that_is_not_finite_is_named_and_no_latent_is_made_of_it(tiny, tmp_path, monkeypatch):
    """Before a step is taken, where bounds are given, too; and of one that became so since."""
    x = np.random.default_rng(0).random((64, 16, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    transform = {"kind": "range", "low": 0.0, "high": 1.0}
    data = {"source": str(tmp_path / "x.npy"), "image_size": 16, "value_transform": transform}
    config = tiny(data=data, stage1__max_steps=2)
    whole = DataConfig(channels=1, source=str(tmp_path / "x.npy"), image_size=16, val_fraction=0.1)
    training, held_out = splits.split(sources.open_source(whole), whole)
    for spoil in (held_out.indices[1], training.indices[50]):
        bad = x.copy()
        bad[spoil, 2, 2] = np.nan
        np.save(tmp_path / "x.npy", bad)
        words = f"image {spoil} has values that are not finite"
        with pytest.raises(InputError, match=words):
            call(stage1_vae.train.main, "--config", config)
    monkeypatch.setattr(splits, "IDENTITY_IMAGES", 1)  # it is not among those that are known again
    np.save(tmp_path / "x.npy", x)
    call(stage1_vae.train.main, "--config", config)
    np.save(tmp_path / "x.npy", bad)
    with pytest.raises(InputError, match=words):
        call(stage1_vae.encode.main, "--run", tmp_path / "run")
    assert not (tmp_path / "run" / "latents" / "manifest.json").exists()


def test_other_images_than_those_of_stage_1_are_not_encoded(tiny, tmp_path):
    """What is held out of others was learned by the VAE."""
    write_images(tmp_path / "photos", 30)
    recipe = tiny(data={"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16})
    call(stage1_vae.train.main, "--config", recipe, "stage1.max_steps=1")
    sorted((tmp_path / "photos").iterdir())[0].unlink()
    with pytest.raises(InputError, match="no longer holds what was trained on"):
        call(stage1_vae.encode.main, "--run", tmp_path / "run")
    assert not (tmp_path / "run" / "latents").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_few_images(tiny, tmp_path, count):
    (tmp_path / "photos").mkdir()
    write_images(tmp_path / "photos", count)
    recipe = tiny(
        data={"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16}, stage1__max_steps=2
    )
    if count < 2:
        with pytest.raises(InputError, match="holds no image" if count == 0 else "1 images; at least 2"):
            call(stage1_vae.train.main, "--config", recipe)
        assert not (tmp_path / "run").exists()
    else:
        call(stage1_vae.train.main, "--config", recipe)  # a batch of eight sees each image more than once
        assert len(log(tmp_path / "run", "stage1_vae")) == 2


def test_statistics_are_applied_exactly_once(trained):
    """What the denoiser sees has mean 0 and deviation 1, and what the decoder gets back is the latent that
    was encoded."""
    from shared import trained as trained_run

    cache = latents.open_cache(trained / "latents")
    moments = cache.split("train").__getitems__(range(58))["moments"]
    pipe = trained_run.open_pipeline(trained)
    mean, std = (torch.tensor(pipe.config.codec[k]) for k in ("mean", "std"))
    torch.testing.assert_close(mean, torch.tensor(cache.manifest["codec"]["mean"]))

    class Finished(torch.nn.Module):
        """A denoiser whose answer brings any noise to the normalised latents at t = 0."""

        def forward(self, z, t, class_labels=None):
            return type("Out", (), {"sample": (z - (moments[:, :4] - mean) / std) / (t / 1000)})

    pipe.unet = Finished()
    pipe.config["classes"].clear()
    z = pipe.sample(pipe.noises(0, 58), None, 1.0, 4)
    torch.testing.assert_close(z, moments[:, :4], atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- long runs

WATCHED = """
import json, os
from pathlib import Path
from shared.training import engine
save_ = engine.save
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def watched(stage, parent, step, *rest):
    save_(stage, parent, step, *rest)
    with open(r"{place}", "a") as file:
        file.write(json.dumps([step, resident(), len(os.listdir("/proc/self/fd"))]) + "\\n")
engine.save = watched
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the memory")
def test_memory_and_open_files_stay_flat(tiny, tmp_path):
    write_images(tmp_path / "photos", 40)
    folder = {"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16, "num_workers": 2}
    every = {f"stage1__{name}_every": 50 for name in ("save", "validate", "preview")}
    recipe = tiny(data=folder, stage1__max_steps=500, **every)
    command(scripted(tmp_path, WATCHED.format(place=tmp_path / "seen")), "--config", recipe, timeout=300)
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) == 10
    _, resident, files = zip(*seen[2:], strict=True)
    assert max(resident) - resident[0] < 32 << 20 and max(files) <= files[0], seen
    for steps in (510, 525):
        command(TRAIN1, "--config", recipe, f"stage1.max_steps={steps}")
    assert [line["step"] for line in log(tmp_path / "run", "stage1_vae")] == list(range(1, 526))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for the memory")
def test_a_set_larger_than_memory_starts_at_once(tiny, tmp_path):
    """30 GB of images in a sparse file: the first steps come within seconds, and memory of its own stays
    below 2 GB."""
    count = 30 * 10**9 // (256 * 256)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (count, 256, 256)}
        )
        file.truncate(file.tell() + count * 256 * 256)
    recipe = tiny(
        data={"source": str(tmp_path / "x.npy"), "image_size": 16, "val_fraction": 0.001},
        stage1__max_steps=100_000,
    )
    begun = time.monotonic()
    process = started(recipe, TRAIN1)
    wait_for(tmp_path / "run" / "stage1_vae" / "metrics.jsonl", process)
    waited = time.monotonic() - begun
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.kill()
    process.wait()
    anonymous = int(status.split("RssAnon:")[1].split()[0]) << 10
    assert waited < 40 and anonymous < 2 << 30, (waited, anonymous)
