"""From images to samples as a user does it, and the errors that users make."""

import json

import numpy as np
import pytest
from PIL import Image

import shared.evaluate
import stage1_vae.train
import stage2_diffusion.train
from shared import trained
from shared.config import InputError
from shared.measure import images
from shared.run import open_run
from tests.conftest import (
    ENCODE,
    ROOT,
    TORCHRUN,
    TRAIN1,
    TRAIN2,
    call,
    command,
    log,
    train_all,
    write_images,
)


def test_a_folder_of_photos_to_samples(tiny, tmp_path):
    """Colour photos in class folders, linear heads, DDPM with v-prediction, every command in its own
    process."""
    for name in ("cats", "dogs"):
        write_images(tmp_path / "photos" / name, 20)
    config = tiny(
        data={"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16, "val_fraction": 0.2},
        stage1__model={"channels": [8, 16], "head": "linear", "latent_shape": [4, 4, 4]},
        stage2__objective="v",
        sampling={"sampler": "dpmpp", "num_steps": 4, "num_images": 4, "guidance_scale": 2.0},
    )
    run = tmp_path / "run"
    command(TRAIN1, "--config", config)
    command(ENCODE, "--run", run, launcher=TORCHRUN)
    done = command(TRAIN2, "--config", config)
    assert "2 classes" in done.stdout
    command("-m", "shared.generate", "--run", run, "--label", "dogs")
    samples = np.load(run / "samples" / "samples.npz")
    assert samples["x"].shape == (4, 3, 16, 16) and samples["label"].tolist() == [1] * 4
    assert Image.open(run / "samples" / "grid.png").mode == "RGB"
    mean = json.loads((run / "latents" / "manifest.json").read_text())["codec"]["mean"]
    assert np.shape(mean) == (4, 4, 4)  # one number per element behind linear heads
    assert {p.name for p in run.iterdir()} == {
        ".lock",
        "recipe.yaml",
        "stage1_vae",
        "latents",
        "stage2_diffusion",
        "pipeline",
        "samples",
    }


def test_a_class_that_nothing_is_learned_of_is_said(tiny, tmp_path, capsys):
    """Its only image is beyond the limit."""
    write_images(tmp_path / "photos" / "cats", 20)
    write_images(tmp_path / "photos" / "dogs", 1)
    data = {"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16, "limit": 15}
    train_all(tiny(data=data))
    assert "nothing to learn of 1 classes, such as dogs" in capsys.readouterr().out


def test_stage_2_on_latents_from_elsewhere_needs_no_images(tiny, trained, tmp_path):
    config = tiny(
        data={"source": "/no/longer/there", "image_size": 16},
        stage2__latents=str(trained / "latents"),
        stage2__max_steps=2,
    )
    command(TRAIN2, "--config", config)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_a_sparse_array_behind_a_hurdle_comes_back_with_exact_zeros(tiny, tmp_path):
    """As many cells are empty in reconstructions as in what was held out; statistics and samples follow."""
    rng = np.random.default_rng(0)
    x = (rng.exponential(5, (120, 16, 16)) * (rng.random((120, 16, 16)) > 0.8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    data = {"source": str(tmp_path / "x.npy"), "image_size": 16, "val_fraction": 0.2, "field": "generic"}
    recipe = tiny(
        data=data | {"value_transform": {"kind": "log1p", "low": 0}},
        stage1__model={"channels": [8, 16], "latent_shape": [4, 4, 4], "output_activation": "hurdle"},
        stage1__loss_weights={"hurdle": 1.0},
    )
    train_all(recipe)
    run = tmp_path / "run"
    vae, transform, _ = trained.open_vae(open_run(run)[0], "cpu")
    _, held_out, _ = trained.open_images(*open_run(run))
    pixels, _ = images.pixels(held_out, transform, 100)
    mean, _ = images.encode(vae, pixels, "cpu")
    found = images.decode(vae, mean, "cpu")
    shares = [(images > -1).float().mean().item() for images in (found, pixels)]
    assert 0 < shares[0] <= shares[1] and (transform.inverse(found)[found <= -1] == 0).all()
    call(shared.evaluate.main, "--run", run, "--num-images", "16", "--extractor", "own")
    statistics = json.loads((run / "report" / "metrics.json").read_text())["statistics"]["all"]
    assert {"0: value", "0: total", "0: maximum", "0: radial spectrum"} <= statistics.keys()
    assert (run / "report" / "statistics.png").is_file()
    data["value_transform"] = {"kind": "minmax", "low": -5}
    with pytest.raises(InputError, match="hurdle is for values of which 0 is the least"):
        other = tiny(data=data, stage1__model={"output_activation": "hurdle", "latent_shape": [4, 4, 4]})
        call(
            stage1_vae.train.main,
            "--config",
            other,
            "stage1.loss_weights={hurdle: 1}",
            f"run_dir={tmp_path}/b",
        )


def test_samples_are_measured_in_training(tiny, tmp_path, capsys):
    train_all(tiny(data={"source": "digits", "image_size": 16, "limit": 200}, stage2__validate_samples=24))
    (line,) = [line for line in log(tmp_path / "run", "stage2_diffusion") if "val/kid" in line]
    assert line["step"] == 8 and line["val/kid"] > 0 and line["val/kid_deviation"] >= 0
    assert "kid" in capsys.readouterr().out


def test_too_few_held_out_latents_to_measure_samples_with(tiny, trained):
    config = tiny(stage2__latents=str(trained / "latents"), stage2__validate_samples=24)
    with pytest.raises(InputError, match="validate_samples: only 6 images are held out; KID needs 16"):
        call(stage2_diffusion.train.main, "--config", config)


def test_too_few_held_out_images_for_that_are_said_before_stage_1(tiny, tmp_path):
    with pytest.raises(InputError, match="validate_samples: only 6 images are held out; KID needs 16"):
        call(stage1_vae.train.main, "--config", tiny(stage2__validate_samples=24))
    assert not (tmp_path / "run").exists()


def test_stage_2_without_classes(tiny, tmp_path):
    short = ["stage1.max_steps=1", "stage2.max_steps=1"]
    train_all(tiny(data__label_column=None), *short, "stage2.objective=epsilon", "sampling.sampler=ddim")
    import shared.generate

    call(shared.generate.main, "--run", tmp_path / "run")
    assert "label" not in np.load(tmp_path / "run/samples/samples.npz")


def test_stage_2_before_the_latents(tiny):
    done = command(TRAIN2, "--config", tiny(), check=False)
    assert done.returncode == 2 and "encode.py" in done.stderr and "Traceback" not in done.stderr


def test_stage_2_refuses_latents_of_an_older_vae(tiny, trained, tmp_path):
    import shutil

    import stage1_vae.train

    shutil.copytree(trained, tmp_path / "run")
    config = tiny()
    call(stage1_vae.train.main, "--config", config, "stage1.max_steps=9")
    done = command(TRAIN2, "--config", config, check=False)
    assert done.returncode == 2 and "stale" in done.stderr and "remove the folder" in done.stderr


def test_stage_2_refuses_other_latents_than_it_began_with(tiny, trained, tmp_path):
    """Stage 1 went on and was encoded anew: the old UNet must not go on with, or be exported beside, the new
    latents."""
    import shutil

    import stage1_vae.encode
    import stage1_vae.train

    run, config = tmp_path / "run", tiny()
    shutil.copytree(trained, run)
    call(stage1_vae.train.main, "--config", config, "stage1.max_steps=9")
    shutil.rmtree(run / "latents")
    call(stage1_vae.encode.main, "--run", run)
    done = command(TRAIN2, "--config", config, check=False)
    assert done.returncode == 2 and "trained on other latents" in done.stderr
    done = command("-m", "shared.generate", "--run", run, check=False)
    assert done.returncode == 2 and "trained on other latents" in done.stderr


def test_stage_2_refuses_latents_of_another_shape(tiny, trained):
    config = tiny(
        stage2__latents=str(trained / "latents"),
        stage1__model={"channels": [8, 16], "head": "conv", "latent_shape": [2, 4, 4]},
    )
    done = command(TRAIN2, "--config", config, check=False)
    assert done.returncode == 2 and "[2, 4, 4]" in done.stderr and "[4, 4, 4]" in done.stderr


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The digits recipe at a third of its length: samples have ink where digits have it."""
    import subprocess

    from tests.conftest import clean_environment

    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    short = ["stage1.max_steps=100", "stage2.max_steps=100"]
    subprocess.run(
        [ROOT / "launch.sh", "demo", *short],
        cwd=tmp_path,
        env=clean_environment(OMP_NUM_THREADS="2"),
        check=True,
    )
    x = np.load(tmp_path / "runs/digits/samples/samples.npz")["x"].astype(float)
    ink = x.mean((0, 1))
    assert x.shape == (100, 1, 32, 32) and x.std() > 50
    assert ink[:, 10:22].mean() > 2 * ink[:, [0, 1, 2, -3, -2, -1]].mean()


@pytest.mark.slow
@pytest.mark.data
def test_300_emoji_from_the_folder_to_pictures(data_sets, weights, tmp_path):
    """The recipe of the gallery, cut to two minutes: transparent around and not within."""
    import subprocess

    from tests.conftest import clean_environment

    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    short = ["data.limit=300", "stage1.max_steps=60", "stage2.max_steps=60", "sampling.num_images=36"]
    source = f"data.source={data_sets / 'emoji64'}"
    subprocess.run(
        [ROOT / "launch.sh", ROOT / "configs/emoji_64.yaml", source, *short],
        cwd=tmp_path,
        env=clean_environment(OMP_NUM_THREADS="2", LATENT_STACK_WEIGHTS=str(weights)),
        check=True,
    )
    run = tmp_path / "runs/emoji_64"
    alpha = np.load(run / "samples/samples.npz")["x"][:, 3].astype(float)
    assert alpha.shape == (36, 64, 64)
    assert alpha[:, 24:40, 24:40].mean() > 2 * alpha[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean()
    with Image.open(run / "samples/00000.png") as picture:
        assert picture.mode == "RGBA"
    assert (run / "report/report.html").is_file()


@pytest.mark.slow
def test_a_sweep_ends_in_one_page(tiny, tmp_path):
    import subprocess

    from tests.conftest import clean_environment

    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    command = [
        ROOT / "launch.sh",
        "sweep",
        tiny(),
        "stage1.loss_weights.kl=0.002,0.02,0.2",
        "stage2.max_steps=4",
    ]
    subprocess.run(command, cwd=tmp_path, env=clean_environment(), check=True)
    runs = [tmp_path / f"run-kl-0.{digits}" for digits in ("002", "02", "2")]
    for run in runs:
        assert {p.name for p in (run / "report").iterdir()} >= {
            "report.html",
            "metrics.json",
            "doctor.json",
            "latents.png",
        }
        assert len((run / "stage2_diffusion" / "metrics.jsonl").read_text().splitlines()) == 4
    page = (runs[0] / "report" / "comparison.html").read_text()
    assert "The trade-off" in page and all(run.name in page for run in runs)
    wrong = subprocess.run(
        [*command[:3], "stage1.loss_weights.kll=1,2"], capture_output=True, text=True, env=clean_environment()
    )
    assert wrong.returncode == 2 and "Did you mean" in wrong.stderr and wrong.stderr.count("\n") == 1
