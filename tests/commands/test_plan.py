"""The plan as a command: what it writes, what it says, and that what it planned runs."""

import os
import re
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stage1_vae.train
import stage2_diffusion.train
from shared import generate, plan, recipe
from shared.config import InputError
from shared.data import splits
from shared.data.sources import open_source
from shared.planning import budget, planner, timing
from shared.planning.write import command_of, until
from stage1_vae import encode
from tests.conftest import ROOT, call, clean_environment, write_images


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(planner.disk, "free", lambda _: 1 << 36)  # however full this machine's is
    monkeypatch.setattr(plan, "BEGUN", time.perf_counter())  # as in a process of its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENT_STACK_WEIGHTS", raising=False)


@pytest.fixture
def cats(tmp_path):
    (tmp_path / "cats").mkdir()
    write_images(tmp_path / "cats", 40, (20, 24))
    return "cats"


SHORT = ("stage1.max_steps=2", "stage2.max_steps=2", "sampling.num_images=4", "stage1.batch_size=4")


def test_folders_of_several_depths_become_a_recipe_with_classes(tmp_path, capsys):
    write_images(tmp_path / "pets" / "cats", 20)
    write_images(tmp_path / "pets" / "dogs" / "small", 20)
    call(plan.main, "pets", "--minutes", "5", *SHORT, "stage2.batch_size=4")
    assert "2 classes (cats, dogs) of 20" in capsys.readouterr().out
    made = recipe.load("runs/pets/plan.yaml")
    assert open_source(made.data).names == ["cats", "dogs"]


def test_a_folder_becomes_a_recipe_and_the_recipe_samples(cats, tmp_path, capsys):
    call(plan.main, cats, "--minutes", "5", *SHORT, "stage2.batch_size=4")
    told = capsys.readouterr().out.splitlines()
    path = "runs/cats/plan.yaml"
    assert told[-1] == path
    for head in ("images: 40 of 20x24 px", "machine: ", "plan: ", "time: ", "disk: ", "expect: "):
        assert any(line.startswith(head) for line in told), head
    content = (tmp_path / path).read_text()
    assert content.startswith("# python -m shared.plan cats --minutes 5 stage1.max_steps=2")
    assert re.search(r"max_steps: 2 +# as you said", content)
    call(stage1_vae.train.main, "--config", path)
    call(encode.main, "--run", "runs/cats")
    call(stage2_diffusion.train.main, "--config", path)
    call(generate.main, "--run", "runs/cats")
    assert (tmp_path / "runs/cats/samples/grid.png").is_file()


def test_the_same_plan_goes_on_and_another_one_is_refused_where_one_has_begun(cats, tmp_path, capsys):
    call(plan.main, cats, "--minutes", "5", *SHORT)
    path = tmp_path / "runs/cats/plan.yaml"
    written, long_ago = path.read_text(), "# until: 2020-01-01T00:00:00"
    path.write_text(re.sub(r"(?m)^# until: .*", long_ago, written))
    call(plan.main, cats, "--minutes", "5", *SHORT)
    assert "planned before" in capsys.readouterr().out
    again = path.read_text()
    assert without_end(again) == without_end(written) and long_ago not in again  # its minutes begin now
    call(stage1_vae.train.main, "--config", "runs/cats/plan.yaml")
    with pytest.raises(InputError, match="holds a training of `python -m shared.plan cats --minutes 5"):
        call(plan.main, cats, "--minutes", "6", *SHORT)
    assert path.read_text() == again
    path.unlink()
    with pytest.raises(InputError, match="runs/cats holds the training of another recipe, or name=ANOTHER"):
        call(plan.main, cats, "--minutes", "5", *SHORT)
    assert not path.exists()


def without_end(content):
    return re.sub(r"(?m)^# until: .*\n", "", content)


def test_stage_2_is_planned_anew_by_the_time_that_is_left(cats, tmp_path, monkeypatch, capsys):
    """Only between the latents and its first checkpoint, and only while there is time."""
    monkeypatch.setattr(budget, "LOOKS_FEW", 10**6)  # of so few cats the time would not matter
    arguments = (
        cats,
        "--minutes",
        "20",
        "stage1.max_steps=2",
        "stage1.batch_size=4",
        "sampling.num_images=4",
        "stage2.preview_every=7",
    )
    call(plan.main, *arguments)
    path = tmp_path / "runs/cats/plan.yaml"
    planned, before = path.read_text(), steps_of(path)
    call(plan.main, *arguments)
    assert without_end(path.read_text()) == without_end(planned)  # no latents yet
    call(stage1_vae.train.main, "--config", path)
    call(encode.main, "--run", "runs/cats")
    soon = (datetime.now() + timedelta(minutes=2)).isoformat(timespec="seconds")
    path.write_text(re.sub(r"(?m)^# until: .*", f"# until: {soon}", planned))
    call(plan.main, *arguments)
    assert f"{steps_of(path):,} steps of stage 2, where {before:,} were planned" in capsys.readouterr().out
    assert steps_of(path) < before / 2 and command_of(path) == planned.split("\n")[0].removeprefix("# ")
    made, was = recipe.load(path), recipe.load(tmp_path / "runs/cats/recipe.yaml")
    assert made.stage2.validate_every <= made.stage2.max_steps and made.stage1 == was.stage1
    assert made.stage2.preview_every == 7  # as said
    settled, written = path.read_text(), path.stat().st_mtime
    log = Path("runs/cats/stage2_diffusion/metrics.jsonl")
    log.parent.mkdir()
    for at_work in (True, False):  # as if all of it had been an hour ago, but for stage 2's log at first
        log.touch()
        for file in (path, *Path("runs/cats").glob("*/m*")):
            if not (at_work and file == log):
                os.utime(file, (written - 3600, written - 3600))
        call(plan.main, *arguments)
        if at_work:
            assert until(path) == datetime.fromisoformat(soon)
    assert timedelta(minutes=59) < until(path) - datetime.fromisoformat(soon) < timedelta(minutes=61)
    assert steps_of(path) > before / 2  # a pause of an hour does not count, and an hour more is left
    gone = (datetime.now() - timedelta(minutes=2)).isoformat(timespec="seconds")
    path.write_text(re.sub(r"(?m)^# until: .*", f"# until: {gone}", settled))
    call(plan.main, *arguments)
    assert steps_of(path) == made.stage2.max_steps
    call(stage2_diffusion.train.main, "--config", path, "stage2.max_steps=1", "stage2.batch_size=4")


def steps_of(path):
    return recipe.load(path).stage2.max_steps


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "data.source: no such file or folder: nowhere"),
        (["cats", "--minutes", "0"], "--minutes: must be more than 0"),
        (["cats", "--minutes", "nan"], "--minutes: must be more than 0"),
        (["cats", "--minutes", "0.05"], "--minutes: 0.05 are too few"),
        (["cats", "stage1.modle.head=conv"], "modle"),
        (["cats", "nonsense"], "an override reads key.sub=value"),
        (["cats", "data.image_size=64x64"], "data.image_size: must be a finite number"),
        (["cats", "data.image_size=[64]"], "data.image_size: a number, or .height, width."),
        (["cats", "stage2.max_steps=2k"], "stage2.max_steps"),
        (["cats", "stage1.model.latent_shape=8"], "latent_shape"),
        (["cats", "stage2.max_epochs=10"], "stage2.max_epochs: a plan counts steps; say stage2.max_steps"),
        (["cats", "stage1.max_steps=null"], "stage1.max_epochs: a plan counts steps"),
        (["cats", "data.image_size=30"], "data.image_size: 30 is not divisible by"),
        (["cats", "stage2=null", "stage2.batch_size=8"], "stage2.batch_size: is of stage 2, and stage2=null"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(arguments, line, cats, tmp_path):
    with pytest.raises(InputError, match=line):
        call(plan.main, *arguments)
    assert not (tmp_path / "runs").exists()


def test_a_long_path_and_a_limit_are_planned(tmp_path, capsys):
    folder = tmp_path / ("a folder of a long name, " * 5)
    folder.mkdir()
    write_images(folder, 40, (20, 24))
    call(plan.main, folder, "--minutes", "5", *SHORT, "data.limit=30", "name=long")
    assert "images: 30 of 20x24 px" in capsys.readouterr().out
    assert recipe.load("runs/long/plan.yaml").data.source == str(folder)


def test_a_pretrained_autoencoder_that_stays_is_planned(cats, tmp_path):
    from diffusers import AutoencoderKL

    channels = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, sample_size=16, **channels).save_pretrained("kl")
    own = ("stage1.model.pretrained=kl", "stage1.model.train=nothing", "data.image_size=16")
    call(plan.main, cats, "--minutes", "5", *SHORT, *own, "stage2.unet.channels=[32]")
    made = recipe.load("runs/cats/plan.yaml")
    assert made.stage1.model.train == "nothing" and made.stage2.max_steps == 2
    with pytest.raises(InputError, match=r"stage2.unet.channels: latents of 15x15 cannot be halved 1 times"):
        call(
            plan.main,
            cats,
            *SHORT,
            *own[:2],
            "data.image_size=15",
            "stage2.unet.channels=[32,32]",
            "name=odd",
        )


def test_an_autoencoder_without_a_posterior_that_stays_is_planned(cats, tmp_path):
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4}
    AutoencoderTiny(**widths, **blocks).save_pretrained("tiny")
    own = ("stage1.model.pretrained=tiny", "stage1.model.train=nothing", "data.image_size=16")
    call(plan.main, cats, "--minutes", "5", *SHORT, *own, "stage2.batch_size=4")
    assert recipe.load("runs/cats/plan.yaml").stage1.loss_weights.kl == 0


def test_a_run_that_the_disk_cannot_hold_is_not_begun(cats, tmp_path, monkeypatch):
    monkeypatch.setattr(planner.disk, "free", lambda _: 1 << 16)
    with pytest.raises(InputError, match="the run would hold .* are free where it will be: run_dir="):
        call(plan.main, cats, "--minutes", "5", *SHORT)
    assert not (tmp_path / "runs").exists()


def test_an_array_of_seven_channels_and_a_recipe_elsewhere(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(48, 7, 16, 24)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    call(plan.main, "x.npy", "--minutes", "5", "--out", "mine.yaml", "stage2=null")
    assert "7 channels" in capsys.readouterr().out
    assert "channels: 7" in (tmp_path / "mine.yaml").read_text() and not (tmp_path / "runs").exists()


def test_a_larger_denoiser_is_timed_too_and_fits_into_the_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "LARGER_FROM", 10_000)  # and not 600,000, so that few minutes do
    monkeypatch.setattr(budget, "MANY", 40)
    monkeypatch.setattr(budget, "LOOKS_FEW", 10**6)
    (tmp_path / "cats").mkdir()
    write_images(tmp_path / "cats", 40, (64, 64))
    call(plan.main, "cats", "--minutes", "50")
    made = recipe.load("runs/cats/plan.yaml")
    assert (made.stage2.unet.channels, made.stage2.unet.blocks_per_level) == ([128, 256], 2)
    first, second = re.search(
        r"stage 1 ([\d.]+) min.* stage 2 ([\d.]+) min", capsys.readouterr().out
    ).groups()
    assert float(first) < float(second) / 2 and 47 < float(first) + float(second) < 50


def test_a_plan_of_images_that_have_changed_is_made_anew(cats, tmp_path, capsys):
    call(plan.main, cats, "--minutes", "5", *SHORT)
    write_images(tmp_path / "cats" / "tabby", 30)
    capsys.readouterr()
    call(plan.main, cats, "--minutes", "5", *SHORT)
    told = capsys.readouterr().out
    assert "cats has changed since" in told and "images: 70 of" in told and "planned before" not in told


def test_a_training_under_way_keeps_its_plan_wherever_that_lies(cats, tmp_path, capsys):
    call(plan.main, cats, "--minutes", "5", *SHORT, "--out", "mine.yaml")
    call(stage1_vae.train.main, "--config", "mine.yaml")
    write_images(tmp_path / "cats" / "tabby", 30)
    call(plan.main, cats, "--minutes", "5", *SHORT, "--out", "mine.yaml")
    assert "planned before: mine.yaml" in capsys.readouterr().out


def test_a_size_too_small_for_what_was_given_is_not_planned(tmp_path):
    (tmp_path / "cats").mkdir()
    write_images(tmp_path / "cats", 40, (64, 64))
    call(plan.main, "cats", "--minutes", "5", *SHORT, "data.augment.shift=16", "data.augment.flip=none")
    assert recipe.load("runs/cats/plan.yaml").data.image_size == 64


def test_kinds_of_channels_of_ones_own_are_planned(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 2, 16, 16)).astype(np.float32)
    x[:, 1] = np.abs(x[:, 1])
    np.save(tmp_path / "x.npy", x)
    kinds = "data.value_transform.kind=[minmax,log1p]"
    call(plan.main, "x.npy", "--minutes", "5", *SHORT, kinds, "data.value_transform.low=null")
    assert recipe.load("runs/x/plan.yaml").data.value_transform.kind == ["minmax", "log1p"]


@pytest.mark.parametrize(("given", "bounds"), [([], (None, None)), ([1.0], (None, 1.0))])
def test_the_set_is_not_read_for_a_plan(tmp_path, monkeypatch, given, bounds):
    """Bounds of values are measured by stage 1; a draft, which is timed, takes those that were looked at."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((600, 1, 16, 16)).astype(np.float32))
    monkeypatch.setattr(splits, "_bounds", None)
    words = [f"data.value_transform.high={high}" for high in given]
    call(plan.main, "x.npy", "--minutes", "5", *SHORT, *words)
    found = recipe.load("runs/x/plan.yaml").data.value_transform
    assert (found.low, found.high) == bounds


def test_names_come_from_the_source():
    names = {
        "~/Pictures/my cats": "my_cats",
        "ylecun/mnist": "mnist",
        "a/fields.npz": "fields",
        "digits": "digits",
    }
    assert {source: plan.run_name(source) for source in names} == names


def test_a_log_that_launch_sh_writes_into_keeps_what_it_holds(tmp_path):
    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    with open(tmp_path / "log", "w") as log:
        log.write("before\n")
        log.flush()
        command = [ROOT / "launch.sh", "nowhere", "--minutes", "5"]
        done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), stdout=log, stderr=log)
    told = (tmp_path / "log").read_text()
    assert done.returncode == 2 and told.startswith(
        "before\nerror: data.source: no such file or folder: nowhere"
    )


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.data
def test_300_emoji_in_two_minutes_from_the_folder_to_a_picture(data_sets, tmp_path):
    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    environment = clean_environment()
    del environment["OMP_NUM_THREADS"]  # on all cores, as a user's command
    command = [ROOT / "launch.sh", data_sets / "emoji64", "data.limit=300", "--minutes"]
    minutes, code = 2, 2
    while code == 2:  # on a slow machine they are too few, and it says how many are enough
        assert minutes <= 6
        begun = time.time()
        run = subprocess.run(
            [*command, str(minutes)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        code = run.returncode
        few = re.search(rf"--minutes: {minutes} are too few: .* give it (\d+),", run.stderr)
        assert code == 0 or few, run.stderr
        minutes = int(few[1]) if few else minutes
    picture = tmp_path / "runs/emoji64/samples/grid.png"
    taken = os.stat(picture).st_mtime - begun
    assert taken < 120 * minutes, f"{taken:.0f} s for {minutes} minutes"  # what else runs here is not known
    with Image.open(picture) as grid:
        colours = np.asarray(grid.convert("RGB"), dtype=float)
    assert colours.std() > 20
