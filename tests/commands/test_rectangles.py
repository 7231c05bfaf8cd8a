"""Images that are higher than wide, or wider than high, through every part."""

import json

import numpy as np
import pytest
from PIL import Image

from shared import doctor, evaluate, generate, recipe, report
from shared.config import InputError
from shared.data import images, sources, splits
from shared.data.config import DataConfig
from tests.conftest import call, train_all, write_images

RECTANGLE = {"image_size": [16, 24], "channels": 4}
NAMES = ["temperature", "velocity", "pressure", "humidity"]
MODEL = {"data": RECTANGLE, "stage1__model__latent_shape": [4, 4, 6]}


def fields(folder) -> str:
    """Twenty-four fields of four channels, 16 x 24, the first in kelvin, the second in metres a second."""
    x = np.random.default_rng(0).random((24, 4, 16, 24)).astype(np.float32)
    x[:, 0] = 270 + 30 * x[:, 0]
    np.savez(folder / "fields.npz", x=x, channel_names=NAMES)
    return str(folder / "fields.npz")


def test_from_an_array_to_a_report(tiny, tmp_path):
    terms = {"l1": 1.0, "ms_ssim": 0.1, "kl": 0.02, "adversarial": 0.01}
    changes = {
        "data": RECTANGLE | {"source": fields(tmp_path), "augment": {"flip": "both", "shift": 2}},
        "stage1__model__latent_shape": [4, 4, 6],
        "stage1__loss_weights": terms,
        "stage1__discriminator": {"channels": [8, 16]},
    }
    train_all(tiny(**changes))
    run = tmp_path / "run"
    call(generate.main, "--run", run, "--num-images", "5")
    assert np.load(run / "samples" / "samples.npz")["x"].shape == (5, 4, 16, 24)
    with Image.open(run / "samples" / "00000.png") as picture:
        assert picture.size == (96, 16) and picture.mode == "L"  # the channels side by side
    call(evaluate.main, "--run", run, "--num-images", "8", "--split", "train")
    call(doctor.main, "--run", run)
    examined = json.loads((run / "report" / "doctor.json").read_text())
    assert len(examined["stage2"]["colour_drift"]) == 4 and len(examined["latent_spectrum"]) == 3
    call(report.main, "--run", run)
    found = json.loads((run / "report" / "metrics.json").read_text())
    rmse = found["reconstruction"]["rmse"]  # a uniform variable's deviation is 0.29 of its range
    assert 5 < rmse["temperature"] < 15
    assert rmse["temperature"] == pytest.approx(30 * rmse["velocity"], rel=0.5)
    assert found["channels"]["held_out"]["temperature"]["mean"] == pytest.approx(285, abs=1)
    assert found["channels"]["samples"]["velocity"]["mean"] == pytest.approx(0.5, abs=0.3)
    assert "rmse.temperature" in (run / "report" / "report.html").read_text()


def test_names_of_channels_that_do_not_fit_are_one_line(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 2, 8, 8)), channel_names=["u", "u"])
    data = DataConfig(source=str(tmp_path / "x.npz"), image_size=8, channels=2)
    with pytest.raises(InputError, match="channel_names of .* must be 2 different names"):
        sources.open_source(data)


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_photographs_become_height_by_width(tmp_path, resize):
    write_images(tmp_path, 3, size=(40, 30))
    data = DataConfig(source=str(tmp_path), image_size=[16, 24], resize=resize)
    assert images.decode(str(tmp_path / "0.png"), data).shape == (3, 16, 24)


def test_patches_of_a_field(tmp_path):
    np.save(tmp_path / "field.npy", np.arange(2 * 16 * 32, dtype=np.float32).reshape(2, 16, 32))
    data = DataConfig(source=str(tmp_path / "field.npy"), image_size=[8, 16], channels=1, resize="patches")
    source = sources.open_source(data)
    assert len(source) == 2 * 5 * 5  # corners 0, 2, ... 8 and 0, 4, ... 16
    assert source.read([0])[0].shape == (1, 8, 16)
    train, _ = splits.split(source, data)
    assert splits.fit_transform(train, data)(train.__getitems__([0])["raw"]).shape == (1, 1, 8, 16)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.image_size=[16,18]", "data.image_size: 18 is not divisible by 4"),
        ("data.image_size=[16,24,8]", r"data.image_size: must be one whole number, or \[height, width\]"),
        ("data.image_size=[16,2]", "data.image_size: must be between 4 and 4096"),
        ("stage1.model.latent_shape=[4,4,4]", r"latent_shape: head: conv leaves \[4, 6\] pixels"),
        ("data.augment.flip=dihedral", "data.augment.flip: dihedral turns images by quarters"),
        ("data.field=speckle", "data.field: the statistics of speckle are of square images"),
        ("stage1.lpips.crop=20", r"stage1.lpips.crop: 20 px do not fit into images of \[16, 24\]"),
    ],
)
def test_what_does_not_fit_a_rectangle_is_one_line(tiny, tmp_path, override, words):
    changes = MODEL | {
        "data": RECTANGLE | {"source": fields(tmp_path)},
        "stage1__lpips": {"channels": "each"},
    }
    path = tiny(**changes, stage1__loss_weights={"l1": 1.0, "lpips": 1.0, "kl": 0.02})
    with pytest.raises(InputError, match=words):
        recipe.load(path, [override])


def test_simulated_fields_are_square(tiny):
    data = RECTANGLE | {"source": "speckle", "channels": 1}
    with pytest.raises(InputError, match="the built-in speckle are square"):
        recipe.load(tiny(data=data, stage1__model__latent_shape=[4, 4, 6]))
