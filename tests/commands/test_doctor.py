"""The doctor's page of a run: numbers and pictures that can be opened, and the probe."""

import json
import shutil

import pytest
import torch
from PIL import Image

from shared import doctor, evaluate, report
from shared.config import InputError
from shared.measure import latent_space, probe
from tests.conftest import call


@pytest.fixture(scope="module")
def examined(trained):
    call(doctor.main, "--run", trained)
    return trained / "report"


def test_numbers(examined):
    found = json.loads((examined / "doctor.json").read_text())
    assert found["dz"] == 64 and 0 <= found["active_units"] <= 64
    assert found["bits"] == pytest.approx(64 * found["bits_per_dimension"])
    assert 0 <= found["knn_accuracy"] <= 1 and len(found["latent_spectrum"]) == 3
    assert found["times_better_than_mean_image"] == pytest.approx(found["mean_image_mse"] / found["mse"])
    assert found["mse_with_latent_noise"].keys() == {"0.1", "0.25", "0.5", "1.0"}


def test_pictures(examined):
    for name in ("latents.png", "latent_space.png", "stochastic.png", "interpolation.png"):
        with Image.open(examined / name) as image:
            assert len(image.convert("L").getcolors(1 << 16)) > 3, f"{name} is empty"
    for name in ("traversal.gif", "interpolation.gif"):
        with Image.open(examined / name) as gif:
            assert gif.n_frames > 10
    assert not (examined / "manifold.png").exists()  # for two latents only


def test_two_latents_and_a_training_whose_checkpoints_were_kept(tiny, tmp_path):
    from stage1_vae import train

    model = {"channels": [8, 16], "head": "linear", "latent_shape": [2, 1, 1]}
    call(train.main, "--config", tiny(stage1__model=model, stage1__save_every=1, stage1__keep=9, stage2=None))
    call(doctor.main, "--run", tmp_path / "run")
    folder = tmp_path / "run" / "report"
    assert Image.open(folder / "manifold.png").width == 15 * 66 + 2
    for name in ("reconstructions.gif", "latent_space.gif"):
        assert Image.open(folder / name).n_frames >= 5


def test_a_principal_plane_keeps_what_varies_most():
    points = torch.randn(200, 5, 1, 1) * torch.tensor([0.01, 3.0, 0.01, 2.0, 0.01]).view(5, 1, 1)
    found = torch.from_numpy(latent_space.plane(points)(points))
    assert found.shape == (200, 2)
    assert found.var(0).sum() == pytest.approx(points.flatten(1).var(0).sum().item(), rel=0.01)


def test_neighbours_of_separate_classes():
    labels = torch.arange(100) % 2
    latents = torch.randn(100, 4, 1, 1) + 10 * labels.view(-1, 1, 1, 1)
    assert latent_space.neighbours(latents[:20], labels[:20], latents, labels) == 1.0
    assert latent_space.neighbours(torch.randn(100, 4, 1, 1), labels, torch.randn(100, 4, 1, 1), labels) < 0.8


def test_one_held_out_image_and_one_latent(tiny, tmp_path):
    from stage1_vae import train

    model = {"channels": [8, 16], "head": "linear", "latent_shape": [1, 1, 1]}
    data = {"data__limit": 8, "data__val_fraction": 0.1}
    call(
        train.main,
        "--config",
        tiny(stage1__model=model, stage1__save_every=1, stage1__keep=9, stage2=None, **data),
    )
    call(doctor.main, "--run", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "report" / "doctor.json").read_text())
    assert found["dz"] == 1 and found["images"] == 1 and "collapse" not in found


def test_latents_from_elsewhere_and_a_training_that_was_stopped(tiny, trained, tmp_path, capsys):
    import stage2_diffusion.train

    config = tiny(stage2__latents=str(trained / "latents"))
    call(stage2_diffusion.train.main, "--config", config)
    shutil.rmtree(tmp_path / "run" / "pipeline")  # as if it had been stopped: its checkpoints are there
    call(doctor.main, "--run", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "report" / "doctor.json").read_text())
    assert found.keys() == {"stage2", "model"} and "stage 2 (numbers in" in capsys.readouterr().out
    call(report.main, "--run", tmp_path / "run")
    assert "report.html" in capsys.readouterr().out
    with pytest.raises(InputError, match="no VAE of its own"):
        call(doctor.main, "--run", tmp_path / "run", "--probe")
    with pytest.raises(InputError, match="no VAE of its own, .*stage2.validate_samples=N"):
        call(evaluate.main, "--run", tmp_path / "run")


def test_probe(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()  # the probe is a flow whatever stage 2 will be
    changed = recipe.replace("objective: flow", "objective: v").replace("sampler: euler", "sampler: ddim")
    (tmp_path / "run" / "recipe.yaml").write_text(changed)
    monkeypatch.setattr(probe, "PROBE_STEPS", 3)
    call(doctor.main, "--run", tmp_path / "run", "--probe")
    found = json.loads((tmp_path / "run" / "report" / "doctor.json").read_text())["probe"]
    assert (
        found["images"] == 6
        and found["fid"] > 0
        and "kid_deviation" in found
        and "classifier" in found["extractor"]
    )
    assert not list((tmp_path / "run").glob(".tmp-probe*"))
    shutil.rmtree(tmp_path / "run" / "latents")
    with pytest.raises(InputError, match="encode.py"):
        call(doctor.main, "--run", tmp_path / "run", "--probe")
