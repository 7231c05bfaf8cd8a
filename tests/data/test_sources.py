"""Any image or array becomes what the recipe says; the split and the order of batches are functions of their
keys."""

import io
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.config import InputError, check
from shared.data import arrays, batches, images, sources, splits
from shared.data.config import DataConfig, ValueTransformConfig, inspect_source, source_kind
from tests.conftest import ROOT, clean_environment, write_images


def everything(source) -> torch.Tensor:
    return torch.from_numpy(np.stack(source.read(list(range(len(source))))))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_any_mode_becomes_what_the_recipe_says(tmp_path, mode, channels):
    levels = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (20, 1))  # (20, 24)
    if mode in ("I;16", "I"):
        image = Image.fromarray(
            (levels.astype(np.uint16) * 257).astype(np.uint16 if mode == "I;16" else np.int32)
        )
    elif mode == "F":
        image = Image.fromarray(levels.astype(np.float32))
    else:
        image = Image.fromarray(levels).convert(mode)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "F", "I", "YCbCr") else "image.png")
    image.save(path)
    config = DataConfig(source=str(tmp_path), image_size=16, channels=channels)
    decoded = images.decode(str(path), config)
    assert decoded.shape == (channels, 16, 16)
    assert decoded.min() >= 0 and decoded.max() <= 255.01
    if mode not in ("1", "CMYK"):
        expected = np.asarray(images.resize(Image.fromarray(levels), config)).astype(float)
        assert np.abs(decoded[0].astype(float) - expected).max() < 4


@pytest.mark.parametrize("side", [24, 16, 7])
def test_colours_that_nobody_sees_change_nothing(tmp_path, side):
    rng = np.random.default_rng(0)
    seen = rng.integers(1, 256, (24, 24, 4), dtype=np.uint8)
    seen[:, :10, 3] = 0
    seen[:, 14:, 3] = 255
    config, decoded = DataConfig(source=str(tmp_path), image_size=side, channels=4), []
    for number in range(2):
        seen[:, :10, :3] = rng.integers(0, 256, (24, 10, 3), dtype=np.uint8)
        Image.fromarray(seen).save(tmp_path / f"{number}.png")
        decoded.append(images.decode(str(tmp_path / f"{number}.png"), config))
    np.testing.assert_array_equal(*decoded)
    assert (decoded[0][3] == 0).any()
    if side == 24:  # what is seen, even hardly, keeps its colour
        np.testing.assert_array_equal(decoded[0][:, :, 10:], seen[:, 10:].transpose(2, 0, 1))


@pytest.mark.parametrize("under", [0, 255])
def test_a_transparent_picture_that_is_resized_has_no_fringe(tmp_path, under):
    red = np.full((40, 40, 4), (under, under, under, 0), np.uint8)
    red[8:29, 11:32] = (200, 30, 60, 255)
    Image.fromarray(red).save(tmp_path / "red.png")
    decoded = images.decode(str(tmp_path / "red.png"), DataConfig(source="x", image_size=16, channels=4))
    seen = decoded[3] > 30
    assert (decoded[3, seen] < 225).sum() > 8 and (decoded[3] == 255).sum() > 8
    assert np.abs(decoded[:3, seen].astype(int) - [[200], [30], [60]]).max() < 4


@pytest.mark.parametrize("channels", [2, 4])
def test_an_opaque_picture_is_resized_as_without_transparency(tmp_path, channels):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))
    picture.save(tmp_path / "opaque.png")
    config = DataConfig(source="x", image_size=16, channels=channels)
    *colours, alpha = images.decode(str(tmp_path / "opaque.png"), config)
    plain = images.decode(str(tmp_path / "opaque.png"), replace(config, channels=channels - 1))
    np.testing.assert_array_equal(colours, plain)
    assert (alpha == 255).all()
    Image.new("LA", (1, 20), (90, 100)).save(tmp_path / "thin.png")
    thin = images.decode(str(tmp_path / "thin.png"), replace(config, resize="pad"))
    assert thin.dtype == np.uint8 and set(thin[0][thin[-1] > 50]) == {90}


def test_what_is_transparent_has_the_colours_nearby(tmp_path):
    halves = np.zeros((64, 80, 4), np.uint8)
    halves[20:44, 10:20] = (200, 0, 0, 255)
    halves[20:44, 60:70] = (0, 0, 200, 255)
    Image.fromarray(halves).save(tmp_path / "halves.png")
    config = DataConfig(source="x", image_size=[64, 80], channels=4)
    red, green, blue, alpha = images.decode(str(tmp_path / "halves.png"), config).astype(int)
    assert (red[18:46, 8:22] > 150).all() and (blue[18:46, 58:72] > 150).all()
    assert (red[:, :10] > red[:, 70:]).all() and (green == 0).all()
    edges = np.abs(np.diff(red, axis=1)).max()
    assert edges < 60 < 200  # no edge where nobody sees one
    Image.new("RGBA", (80, 64)).save(tmp_path / "nothing.png")
    assert (images.decode(str(tmp_path / "nothing.png"), config) == 0).all()


def test_16_bit_keeps_its_depth(tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 100 + 7
    Image.fromarray(values).save(tmp_path / "deep.png")
    decoded = images.decode(str(tmp_path / "deep.png"), DataConfig(channels=1, image_size=16))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded[0] * 257, values, rtol=1e-5)


def test_a_narrow_range_of_16_bits_is_not_rounded(tmp_path):
    """12 bits in files of 16, whose range is measured, come back in all their levels."""
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 4096, (8, 8)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    data = DataConfig(source=str(tmp_path), image_size=8, channels=1)
    data.value_transform = ValueTransformConfig(kind="minmax")
    pixels = splits.whole(sources.open_source(data))
    transform = splits.fit_transform(pixels, data)
    raw = pixels.__getitems__([0])["raw"]
    torch.testing.assert_close(transform.inverse(transform(raw)), raw)


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_a_large_jpeg_decoded_at_a_fraction_of_its_size_is_the_same_image(tmp_path, resize):
    rows, columns = np.mgrid[0:900, 0:1300] / 100
    waves = np.stack([np.sin(rows * 3), np.sin(columns * 5), np.sin(rows * columns)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 20, waves.shape)
    image = Image.fromarray((127 + 90 * waves + noise).clip(0, 255).astype(np.uint8))
    image.save(tmp_path / "large.jpg", quality=90)
    config = DataConfig(channels=3, image_size=[48, 64], resize=resize)
    with Image.open(tmp_path / "large.jpg") as whole:
        expected = np.asarray(images.resize(whole.convert("RGB"), config)).transpose(2, 0, 1)
    error = images.decode(str(tmp_path / "large.jpg"), config) - expected.astype(float)
    assert abs(error.mean()) < 0.3 and np.abs(error).mean() < 1.5


def test_exif_rotation_is_undone(tmp_path):
    image = Image.new("L", (20, 10))
    image.paste(255, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    decoded = images.decode(
        str(tmp_path / "turned.jpg"), DataConfig(channels=1, image_size=10, resize="stretch")
    )
    assert decoded[0, :4].mean() > 200 > 50 > decoded[0, 6:].mean()  # what lay on the left is now on top


def test_transparency_lies_on_white():
    config = DataConfig(image_size=4, channels=3)
    import io

    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, "PNG")
    assert (images.decode(buffer.getvalue(), config) == 255).all()


@pytest.mark.parametrize(
    ("way", "size"), [("crop", (40, 20)), ("stretch", (40, 20)), ("pad", (40, 20)), ("pad", (6, 9))]
)
def test_resize(way, size):
    out = images.resize(Image.new("L", size, 200), DataConfig(channels=1, image_size=16, resize=way))
    assert out.size == (16, 16)
    share = (np.asarray(out) > 100).mean()
    expected = 1.0 if way != "pad" else 0.5 if size == (40, 20) else 54 / 256
    assert share == pytest.approx(expected, abs=0.02)


def test_image_folder_with_classes(tmp_path):
    write_images(tmp_path / "cats", 3)
    write_images(tmp_path / "dogs", 4)
    source = sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))
    assert source.names == ["cats", "dogs"] and sorted(source.labels.tolist()) == [0, 0, 0, 1, 1, 1, 1]
    assert everything(source).shape == (7, 3, 8, 8)


def test_names_of_splits_are_nothing_special_in_a_folder(tmp_path):
    for name in ("car", "plane", "train"):
        write_images(tmp_path / "classes" / name, 3)
    source = sources.open_source(DataConfig(source=str(tmp_path / "classes"), image_size=8, channels=3))
    assert len(source) == 9 and source.names == ["car", "plane", "train"]
    write_images(tmp_path / "flat", 3)
    (tmp_path / "flat" / "0.png").rename(tmp_path / "flat" / "train-station.png")
    assert len(sources.open_source(DataConfig(source=str(tmp_path / "flat"), image_size=8, channels=3))) == 3


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_colours_are_resized_at_once_to_the_bits_of_each_by_itself(tmp_path, resize):
    write_images(tmp_path, 3, size=(37, 53))
    data = DataConfig(source=str(tmp_path), image_size=[24, 16], channels=3, resize=resize)
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            planes = [np.asarray(images.resize(plane, data)) for plane in image.split()]
        assert np.array_equal(images.decode(str(path), data), np.stack(planes))


def test_split_folders(tmp_path):
    write_images(tmp_path / "train" / "cats", 3)
    write_images(tmp_path / "train" / "dogs", 3)
    write_images(tmp_path / "test" / "cats", 2)
    for split, count in (("train", 6), ("test", 2)):
        config = DataConfig(source=str(tmp_path), split=split, image_size=8, channels=3)
        inspect_source(config)
        assert len(sources.open_source(config)) == count
    for source in (tmp_path, tmp_path / "train", "digits"):
        with pytest.raises(InputError, match=r"data\.split"):
            inspect_source(DataConfig(channels=1, source=str(source), split="val"))


def test_what_tools_leave_beside_the_splits_is_no_split(tmp_path):
    write_images(tmp_path / "Train" / "cats", 3)
    write_images(tmp_path / "TEST" / "cats", 2)
    write_images(tmp_path / ".ipynb_checkpoints", 1)
    write_images(tmp_path / "__MACOSX" / "Train", 1)
    for split, count in (("train", 3), ("test", 2)):
        config = DataConfig(source=str(tmp_path), split=split, image_size=8, channels=3)
        inspect_source(config)
        assert len(sources.open_source(config)) == count


def test_classes_that_are_lost_by_an_image_elsewhere_are_said(tmp_path, capsys):
    write_images(tmp_path / "cats", 3)
    write_images(tmp_path / "dogs", 3)
    write_images(tmp_path, 1)
    source = sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))
    assert len(source) == 7 and source.labels is None
    assert "not all images lie in its sub-folders: move the others into one" in capsys.readouterr().out


def test_of_folders_of_different_depths_the_uppermost_are_the_classes(tmp_path, capsys):
    write_images(tmp_path / "cats", 3)
    write_images(tmp_path / "dogs" / "small" / "white", 2)
    write_images(tmp_path / "dogs" / "large", 2)
    (tmp_path / "elsewhere").mkdir()
    write_images(tmp_path / "elsewhere" / "old", 2)
    (tmp_path / "horses").symlink_to(tmp_path / "elsewhere" / "old")
    config = DataConfig(source=str(tmp_path), image_size=8, channels=3)
    source = sources.open_source(config)
    assert source.names == ["cats", "dogs", "elsewhere", "horses"]
    assert np.bincount(source.labels).tolist() == [3, 4, 2, 2]
    assert "classes by the folders directly in it, for its images lie at several" in capsys.readouterr().out
    assert sources.open_source(replace(config, label_column=None)).labels is None
    assert sources.open_source(replace(config, label_column="label")).names == source.names
    nearby = replace(config, source=f"{tmp_path}/cats/..")
    assert sources.open_source(nearby).names == source.names


def test_tables_beside_many_images_tell_of_them(tmp_path):
    write_images(tmp_path / "00000", 51, (8, 8))
    (tmp_path / "00000.parquet").write_bytes(b"what is known of them")
    config = DataConfig(source=str(tmp_path), image_size=8, channels=3)
    assert source_kind(config) == "images" and len(sources.open_source(config)) == 51
    (tmp_path / "00000" / "0.png").unlink()  # previews, beside a set
    assert source_kind(config) == "parquet"


def test_splits_within_folders_are_no_classes(tmp_path, capsys):
    for name in ("cats/train", "cats/test", "dogs/train", "dogs/val2017"):
        write_images(tmp_path / "pets" / name, 2)
    config = DataConfig(source=str(tmp_path / "pets"), image_size=8, channels=3)
    assert sources.open_source(config).names == ["cats", "dogs"]
    assert "test, train, val2017 are splits" in capsys.readouterr().out
    config = replace(config, source=str(tmp_path / "pets" / "dogs"))
    assert sources.open_source(replace(config, split="train")).labels is None
    assert "no classes, for train, val2017 are splits" in capsys.readouterr().out


def test_what_is_left_out_of_a_folder_of_images_is_said(tmp_path, capsys):
    write_images(tmp_path / "images", 3)
    write_images(tmp_path / "masks", 3)
    for name in ("photo", "photo.jpg?w=640", "photo.jpg.json", "list.csv"):
        (tmp_path / "images" / name).write_text("{}")
    source = sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))
    assert len(source) == 6 and source.names == ["images", "masks"]
    said = capsys.readouterr().out
    assert "left out are 2 files of no known ending: rename them if they are images" in said
    assert "is not read: what is known of images is read from metadata.csv" in said
    assert "masks is a class; if it holds no pictures, name the folder of these" in said
    for path in (tmp_path / "images").glob("*.png"):
        path.rename(path.with_suffix(""))
    for name in ("photo.jpg.json", "list.csv"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(InputError, match="give its images an ending, such as .jpg"):
        inspect_source(DataConfig(source=str(tmp_path / "images")))


def test_image_folder_with_metadata(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,kind\n0.png,b\n1.png,a\n2.png,b\n")
    source = sources.open_source(
        DataConfig(source=str(tmp_path), image_size=8, channels=3, label_column="kind")
    )
    assert source.names == ["a", "b"] and source.labels.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="no column 'sort'"):
        sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3, label_column="sort"))


def test_what_lies_beside_images_is_no_image(tmp_path, capsys):
    """Notes of a photo service, an archive of the same files, photos that the library passes over."""
    for name in ("cats", "dogs"):
        write_images(tmp_path / name, 3)
        for image in list((tmp_path / name).iterdir()):
            image.with_name(f"{image.name}.supplemental-metadata.json").write_text("{}")
    (tmp_path / "cats" / "0.png").rename(tmp_path / "cats" / "0.PNG")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for image in tmp_path.glob("*/*.png"):
            archive.write(image, image.relative_to(tmp_path))
    (tmp_path / "cats" / "IMG_1.HEIC").write_bytes(b"photo")
    source = sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))
    assert len(source) == 6 and source.names == ["cats", "dogs"] and everything(source).shape[0] == 6
    sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))
    told = capsys.readouterr().out
    assert told.count("left out are 1 HEIC, AVIF or JPEG XL: save them as JPEG") == 1


def test_images_that_the_metadata_does_not_list_are_counted(tmp_path, capsys):
    write_images(tmp_path, 4)
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n2.png,b\n")
    assert len(sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))) == 3
    assert "1 of 4 images are in no row of its metadata: left out" in capsys.readouterr().out
    (tmp_path / "metadata.csv").write_text("file_name,label\n/elsewhere/0.png,a\n")
    with pytest.raises(InputError, match="cannot be loaded .*must be a relative path"):
        sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))


@pytest.mark.parametrize(
    ("names", "source", "cure"),
    [
        (["a.h5"], "", "python -m shared.convert .* makes an array"),
        (["a.nii.gz"], "a.nii.gz", "python -m shared.convert .* makes an array"),
        (["a.tif"], "a.tif", "python -m shared.convert .* makes an array"),
        (["a.png"], "a.png", "name its folder"),
        (["a.HEIC"], "", "save its photos as JPEG"),
        (["a.npy", "b.npy"], "", "name one, or make one of all: python -m shared.convert"),
        (["a.zip"], "", "unpack it"),
        (["a.arrow"], "a.arrow", "save_to_disk"),
        (["a.csv"], "a.csv", "as PNG or JPEG, or as an .npz of x"),
    ],
)
def test_what_is_not_read_has_a_cure(tmp_path, names, source, cure):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=cure):
        source_kind(DataConfig(source=str(tmp_path / source)))


def test_a_damaged_archive_of_arrays_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez_compressed(tmp_path / "x.npz", x=np.random.default_rng(0).random((20, 8, 8)))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match="x.npz is damaged"):
        sources.open_source(DataConfig(source=str(tmp_path / "x.npz"), image_size=8, channels=1))
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("place", [45, 60, 300])
def test_an_archive_damaged_in_its_head_is_one_line(tmp_path, place):
    np.savez_compressed(tmp_path / "x.npz", x=np.random.default_rng(0).random((20, 8, 8)))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for byte in range(place, place + 20):
        content[byte] ^= 255
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match="x.npz is (not a readable array file|damaged)"):
        sources.open_source(DataConfig(source=str(tmp_path / "x.npz"), image_size=8, channels=1))


def test_words_of_bytes_are_words(tmp_path, monkeypatch):
    """As those of HDF5 are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = {"x": np.zeros((2, 2, 8, 8), np.float32), "label": np.array([b"cat", b"dog"])}
    np.savez(tmp_path / "x.npz", **parts, channel_names=np.array([b"u", b"v"]))
    data = DataConfig(source=str(tmp_path / "x.npz"), image_size=8, channels=2)
    source = sources.open_source(data)
    assert source.channel_names == ["u", "v"] and source.names == ["cat", "dog"]
    np.savez(tmp_path / "x.npz", **parts | {"label": np.array([b"caf\xe9", b"bar"])})
    with pytest.raises(InputError, match="not a readable array file .'utf-8'"):
        sources.open_source(data)


def test_labels_that_number_the_images_are_no_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "x.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20))
    data = DataConfig(source=str(tmp_path / "x.npz"), image_size=8, channels=1)
    assert sources.open_source(data).labels is None
    assert "20 different labels of 20 images are no classes" in capsys.readouterr().out
    data.label_column = "y"
    assert len(sources.open_source(data).names) == 20


def test_measured_numbers_are_no_classes_unless_asked_for(tmp_path, capsys):
    write_images(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,0.25\n1.png,0.5\n2.png,0.25\n")
    source = sources.open_source(DataConfig(source=str(tmp_path), image_size=8, channels=3))
    assert source.labels is None and "measured numbers, no classes" in capsys.readouterr().out
    asked = DataConfig(source=str(tmp_path), image_size=8, channels=3, label_column="label")
    assert sources.open_source(asked).names == ["0.25", "0.5"]


def test_never_are_two_processes_in_one_place(tmp_path):
    """Six at once, each many times: also who waited for a file that its holder has removed meanwhile."""
    code = (
        "import sys; from pathlib import Path; from shared.disk import alone\n"
        "for _ in range(60):\n"
        "    with alone(Path(sys.argv[1]) / 'lock'):\n"
        "        inside = Path(sys.argv[1]) / 'inside'\n"
        "        inside.touch(exist_ok=False); inside.unlink()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen(arguments, cwd=ROOT, env=clean_environment()) for _ in range(6)]
    assert [process.wait() for process in started] == [0] * 6 and not list(tmp_path.iterdir())


def test_a_revision_is_of_a_hub_id(tmp_path, monkeypatch):
    import datasets

    asked = []
    images_of = {"image": [Image.new("L", (8, 8), level) for level in (0, 100, 200)]}

    def load_dataset(**where):  # what the library would fetch
        asked.append(where)
        return datasets.Dataset.from_dict(images_of).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig(source="someone/something", image_size=8, channels=1, revision="v1.0")
    inspect_source(data)
    assert len(sources.open_source(data)) == 3
    assert asked == [{"path": "someone/something", "revision": "v1.0", "split": "train"}]
    with pytest.raises(InputError, match=r"data\.revision: is of a hub id"):
        inspect_source(DataConfig(source=str(write_images(tmp_path)), revision="v1.0"))


def test_parquet(tmp_path):
    import datasets

    images = [Image.fromarray(np.full((8, 8), i * 20, np.uint8)) for i in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 1]}, features=features)
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    for place in (tmp_path, tmp_path / "train-00000-of-00001.parquet"):
        source = sources.open_source(DataConfig(channels=1, source=str(place), image_size=8))
        assert everything(source)[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80]
        assert source.labels.tolist() == [0, 1, 0, 1, 1] and source.names == ["a", "b"]


@pytest.mark.parametrize("divided", [False, True])
def test_what_datasets_saved_is_read_where_it_lies(tmp_path, divided):
    import datasets

    images = [Image.fromarray(np.full((8, 8), i * 20, np.uint8)) for i in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 1]}, features=features)
    table = table.with_format("numpy")  # is saved, too
    (datasets.DatasetDict(train=table, test=table) if divided else table).save_to_disk(tmp_path / "set")
    data = DataConfig(channels=1, source=str(tmp_path / "set"), image_size=8)
    source = sources.open_source(data)
    assert everything(source)[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80] and len(source.content(1)) > 50
    assert source.labels.tolist() == [0, 1, 0, 1, 1] and source.names == ["a", "b"]
    data.split = "validation"
    with pytest.raises(InputError, match=r"data\.split: .*set has train.*, not validation"):
        sources.open_source(data)
    data.split = "train"
    for file in (tmp_path / "set").rglob("*.arrow"):
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"data\.source: .*set, split train, cannot be loaded"):
        sources.open_source(data)


@pytest.mark.parametrize("kept", ["bytes", "a struct"])
def test_parquet_of_encoded_files(tmp_path, kept):
    import pyarrow as pa
    from pyarrow import parquet

    files = []
    for number in range(5):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), number * 20, np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    cells = files if kept == "bytes" else [{"bytes": file, "path": None} for file in files]
    parquet.write_table(pa.table({"picture": cells, "label": [0, 1, 0, 1, 1]}), tmp_path / "train.parquet")
    source = sources.open_source(DataConfig(channels=1, source=str(tmp_path), image_size=8))
    assert everything(source)[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80] and len(source.content(1)) > 50
    assert source.labels.tolist() == [0, 1, 0, 1, 1]


def test_an_unreadable_image_is_named_and_replaced_up_to_a_limit(tmp_path, capsys):
    write_images(tmp_path, 6)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    config = DataConfig(source=str(tmp_path), image_size=8, channels=3, max_bad_fraction=0.2)
    source = sources.open_source(config)
    source.labels = np.arange(6)
    odd = splits.Pixels(
        source, np.array([0, 2, 4])
    )  # the replacement is of the same split, under its own label
    batch = odd.__getitems__([0, 1, 2])
    assert "2.png" in capsys.readouterr().out
    assert torch.equal(batch["raw"][1], batch["raw"][2]) and batch["label"].tolist() == [0, 4, 4]
    config.max_bad_fraction = 0.1
    with pytest.raises(InputError, match=r"2\.png"):
        splits.Pixels(sources.open_source(config), np.arange(6)).__getitems__([1, 2])


def test_a_mapped_array_travels_to_a_loader_process_as_its_path(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(2 * 64 * 64, dtype=np.uint8).reshape(2, 64, 64))
    source = sources.open_source(DataConfig(channels=1, source=str(tmp_path / "x.npy"), image_size=64))
    state = source.__getstate__()
    assert state["x"] == tmp_path / "x.npy"
    again = arrays.ArraySource.__new__(arrays.ArraySource)
    again.__setstate__(state)
    np.testing.assert_array_equal(again.read([1])[0], source.read([1])[0])


# ---------------------------------------------------------------- arrays


def test_an_array_is_not_cropped_without_a_word(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((3, 3, 8, 12), np.float32))
    for size, said in (
        (8, "images of 8x12 become 8x8 (data.resize: crop, data.image_size)"),
        (16, "images of 8x12 become 16x16"),
    ):
        sources.open_source(DataConfig(source=str(tmp_path / "x.npy"), image_size=size))
        assert said in capsys.readouterr().out
    np.save(tmp_path / "y.npy", np.zeros((3, 8, 8), np.float32))
    sources.open_source(DataConfig(source=str(tmp_path / "y.npy"), image_size=8, channels=1))
    assert not capsys.readouterr().out


def test_folders_that_are_links_are_entered(tmp_path):
    """All classes or one of them, once each; a link that leads in a circle is left."""
    for name in ("cats", "dogs"):
        write_images(tmp_path / "elsewhere" / name, 3)
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    data = DataConfig(source=str(tmp_path / "set"), image_size=16)
    assert inspect_source(data) is None and sources.open_source(data).names == ["cats", "dogs"]
    write_images(tmp_path / "set" / "birds", 3)
    (tmp_path / "set" / "birds" / "again").symlink_to(tmp_path / "set")
    source = sources.open_source(data)
    assert len(source) == 9 and source.names == ["birds", "cats", "dogs"]


def test_an_array_that_is_another_one_by_now_is_one_line(tmp_path):
    """As encode, evaluate and doctor find it where somebody changed the file after the training."""
    data = DataConfig(channels=3, source=str(tmp_path / "x.npz"), image_size=8)
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8, 8)))
    with pytest.raises(InputError, match=r"data.channels: 3, but the array .* \(4, 8, 8\)"):
        sources.open_source(data)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:200])
    with pytest.raises(InputError, match="x.npz is not a readable array file"):
        sources.open_source(data)


@pytest.mark.parametrize(("resize", "side"), [("crop", 10), ("stretch", 10), ("pad", 10), ("crop", 13)])
def test_values_that_are_shrunk_are_means_over_areas_and_grey_levels_are_a_picture(tmp_path, resize, side):
    x = np.zeros((3, 2, 20, 20), np.float32)
    x[0, 0, 3, 7], x[1, 1, 18, 0], x[2, 0, 5, 5] = 400, 80, 1
    np.save(tmp_path / "x.npy", x)
    data = DataConfig(source=str(tmp_path / "x.npy"), image_size=side, channels=2, resize=resize)
    shrunk = np.stack(sources.open_source(data).read([0, 1, 2]))
    np.testing.assert_allclose(shrunk.mean((2, 3)), x.mean((2, 3)), rtol=1e-5)
    assert splits.identity(splits.whole(sources.open_source(data)), data)["resized"]
    assert shrunk.min() == 0 and (side != 10 or np.count_nonzero(shrunk) == 3)
    grown = np.stack(sources.open_source(replace(data, image_size=[32, 24], resize="crop")).read([0]))
    assert grown.min() == 0 and grown.max() <= 400  # bicubic alone overshoots
    levels = np.random.default_rng(0).integers(0, 255, (3, 20, 20), dtype=np.uint8)
    np.save(tmp_path / "x.npy", levels)
    found = np.stack(sources.open_source(replace(data, channels=1)).read([0, 1, 2]))[:, 0]
    as_pictures = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in levels]
    np.testing.assert_array_equal(found, np.stack([np.asarray(one) for one in as_pictures]))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float16", "float32", "float64", "bool"])
@pytest.mark.parametrize(
    ("shape", "channels"), [((5, 8, 8), 1), ((5, 3, 8, 8), 3), ((5, 8, 8, 3), 3), ((5, 7, 8, 8), 7)]
)
def test_arrays(tmp_path, monkeypatch, suffix, dtype, shape, channels):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, shape).astype(dtype)
    path = tmp_path / f"x{suffix}"
    np.save(path, x) if suffix == ".npy" else np.savez(path, x=x, label=np.array([3, 1, 3, 1, 7]))
    config = DataConfig(source=str(path), image_size=8, channels=channels)
    inspect_source(config)
    source = sources.open_source(config)
    assert isinstance(source.x, np.memmap)
    planes = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if x.shape[-1] == channels else x
    np.testing.assert_array_equal(
        everything(source).numpy(), planes.astype(np.uint8 if dtype == "uint8" else np.float32)
    )
    if suffix == ".npz":
        assert source.labels.tolist() == [1, 0, 1, 0, 2] and source.names == ["1", "3", "7"]


@pytest.mark.parametrize(
    ("name", "labels", "names"),
    [
        ("label", np.array([b"dog", b"cat"] * 2), ["cat", "dog"]),
        ("label", np.array([[3], [1], [3], [1]]), ["1", "3"]),
        ("label", np.array([0.5, 0.25, 0.1, 0.9]), []),
        ("labels", np.array([1, 0, 1, 0]), ["0", "1"]),
        ("y", np.array([1.0, 0.0, 1.0, 0.0]), ["0", "1"]),
        ("y", np.array([0.5, 0.25, 0.1, 0.9]), []),
        ("y", np.array([[0.1, 0.2]] * 4), []),
    ],
)
def test_labels_of_an_array(tmp_path, monkeypatch, name, labels, names):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8, 8)), **{name: labels})
    assert (
        sources.open_source(DataConfig(channels=1, source=str(tmp_path / "x.npz"), image_size=8)).names
        == names
    )


@pytest.mark.parametrize("names", ["{}_images {}_labels", "x_{} y_{}"])
def test_an_npz_that_holds_its_splits(tmp_path, monkeypatch, names):
    """As MedMNIST's and Keras's do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arrays = {}
    for value, (part, count) in enumerate({"train": 6, "test": 4}.items()):
        images, labels = names.format(part, part).split()
        arrays[images] = np.full((count, 8, 8), value, np.uint8)
        arrays[labels] = np.arange(count, dtype=np.uint8)[:, None] % 2
    np.savez(tmp_path / "set.npz", **arrays)
    for part, count in (("train", 6), ("test", 4)):
        data = DataConfig(channels=1, source=str(tmp_path / "set.npz"), split=part, image_size=8)
        inspect_source(data)
        source = sources.open_source(data)
        assert len(source) == count and source.names == ["0", "1"]
        assert everything(source).numpy().max() == (part == "test")
    data = DataConfig(channels=1, source=str(tmp_path / "set.npz"), split="val", image_size=8)
    with pytest.raises(InputError, match="data.split: .*set.npz holds no val_images"):
        inspect_source(data)


def test_a_lone_number_is_no_label_of_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8, 8)), label=3)
    with pytest.raises(InputError, match="4 images, but 1 labels"):
        sources.open_source(DataConfig(channels=1, source=str(tmp_path / "x.npz"), image_size=8))


def test_labels_in_a_table_of_images(tmp_path, capsys):
    write_images(tmp_path, 20)
    files = sorted(path.name for path in tmp_path.iterdir())
    data = DataConfig(channels=3, source=str(tmp_path), image_size=8)
    table = tmp_path / "metadata.csv"
    rows = [f"{file},{number % 2 * 2 - 1}" for number, file in enumerate(files)]
    table.write_text("\n".join(["file_name,label", *rows]))
    assert sources.open_source(data).names == ["-1", "1"]
    rows = [f"{file},a photo of {file}" for file in files]
    table.write_text("\n".join(["file_name,label", *rows]))
    assert sources.open_source(data).names == [] and "are no classes" in capsys.readouterr().out


def test_labels_in_a_table_beside_an_array(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((3, 8, 8)))
    data = DataConfig(channels=1, source=str(tmp_path / "x.npy"), image_size=8)
    table = tmp_path / "x.csv"
    table.write_text("label,age\ncat,1\ndog,2\ncat,3\n", encoding="utf-8-sig")
    assert sources.open_source(data).names == ["cat", "dog"]
    table.write_text("label\n1_2\n12\nnan\n")  # words that Python would take for numbers
    assert sources.open_source(data).names == ["12", "1_2", "nan"]
    table.write_text("label\n0.5\n0.25\n.1\n")
    assert sources.open_source(data).labels is None and "measured numbers" in capsys.readouterr().out
    table.write_text("label,age\ncat,1\n,2\ncat,3\n")
    with pytest.raises(InputError, match=r"x.csv: row 2 has no label"):
        sources.open_source(data)


@pytest.mark.parametrize(
    ("images", "labels"),
    [("X", "y"), ("X_train", "y_train"), ("train_images", "train_labels"), ("a", "label")],
)
def test_labels_in_an_array_beside_an_array(tmp_path, capsys, images, labels):
    np.save(tmp_path / f"{images}.npy", np.zeros((4, 8, 8)))
    data = DataConfig(channels=1, source=str(tmp_path / f"{images}.npy"), image_size=8)
    np.save(tmp_path / f"{labels}.npy", np.array([3.0, 1.0, 3.0, 1.0]))
    assert sources.open_source(data).names == ["1", "3"]
    assert f"the classes of {images}.npy are those of {labels}.npy" in capsys.readouterr().out
    assert sources.open_source(replace(data, label_column=None)).labels is None
    for others in (np.zeros(3), np.zeros((4, 8, 8)), np.array([0.5, 0.1, 0.2, 0.3]), np.array([None] * 4)):
        np.save(tmp_path / f"{labels}.npy", others)
        assert sources.open_source(data).labels is None


def test_large_fields_are_cut_into_patches_that_overlap_less(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.data.config.MOST_PATCHES", 200)
    np.save(tmp_path / "x.npy", np.zeros((3, 64, 64), np.float32))
    data = DataConfig(source=str(tmp_path / "x.npy"), image_size=16, channels=1, resize="patches")
    assert len(sources.open_source(data)) == 3 * 7 * 7  # by half of a side: 3 * 13 * 13 would be more
    monkeypatch.setattr("shared.data.config.MOST_PATCHES", 2)
    assert len(sources.open_source(data)) == 3 * 4 * 4  # nothing is left out


def test_a_folder_of_arrays_by_split(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez(tmp_path / "train.npz", x=np.zeros((4, 8, 8)))
    np.savez(tmp_path / "test.npz", x=np.zeros((3, 8, 8)))
    assert (
        len(sources.open_source(DataConfig(channels=1, source=str(tmp_path), split="test", image_size=8)))
        == 3
    )


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((5, 2, 8, 8)), "data.channels: 3"),
        (np.zeros((5, 8)), "data.channels"),
        (np.zeros((1, 3, 8, 8)), "at least 2"),
        (np.zeros((5, 3, 8, 8), complex), "real numbers"),
        (np.array(["a", "b"]), "real numbers"),
    ],
)
def test_wrong_arrays_are_refused_from_their_header(tmp_path, x, words):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=words):
        inspect_source(DataConfig(source=str(tmp_path / "x.npy"), image_size=8, channels=3))


def test_object_arrays_are_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="x.npy"):
        inspect_source(DataConfig(channels=1, source=str(tmp_path / "x.npy")))


def test_sources_that_are_not_there(tmp_path):
    for source, words in ((tmp_path / "none", "no such file or folder"), (tmp_path, "holds no image")):
        with pytest.raises(InputError, match=words):
            inspect_source(DataConfig(channels=1, source=str(source)))
    with pytest.raises(InputError, match="nobody/nothing"):
        sources.open_source(DataConfig(channels=1, source="nobody/nothing"))


def test_built_in_digits():
    source = sources.open_source(DataConfig(source="digits", channels=1, image_size=32))
    assert len(source) == 1797 and source.names == [str(i) for i in range(10)]
    assert source.read([0])[0].shape == (1, 32, 32) and source.read([0])[0].dtype == np.uint8


# ---------------------------------------------------------------- value transform, split, batches


def fields(tmp_path, **changes) -> tuple[splits.Pixels, DataConfig]:
    """A temperature in kelvin beside a velocity of a few metres a second."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.uniform(200, 320, (9, 8, 8)), rng.uniform(-2, 3, (9, 8, 8))], 1).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    config = DataConfig(source=str(tmp_path / "x.npy"), channels=2, image_size=8, **changes)
    return splits.split(sources.open_source(config), config)[0], config


def test_channels_of_different_units_are_mapped_each_by_itself(tmp_path):
    train, config = fields(tmp_path)
    raw = train.__getitems__(list(range(len(train))))["raw"]
    x = splits.fit_transform(train, config)(raw)
    assert x.amin((0, 2, 3)).tolist() == pytest.approx([-1, -1]) and x.amax(
        (0, 2, 3)
    ).tolist() == pytest.approx([1, 1])


def test_bounds_may_be_given_for_some_channels(tmp_path):
    transform = ValueTransformConfig(kind=["range", "minmax"], low=[0.0, None], high=[400.0, None])
    train, config = fields(tmp_path, value_transform=transform)
    check(config)
    found = splits.fit_transform(train, config).config
    assert found["low"][0] == 0 and found["high"][0] == 400
    assert -2 <= found["low"][1] < -1.9 and 2.9 < found["high"][1] <= 3


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"kind": ["range", "minmax"], "low": 0.0}, "kind: range needs low and high"),
        ({"kind": ["auto", "minmax"]}, "kind: auto chooses for all channels"),
        ({"kind": "range", "low": [0.0, 5.0], "high": 4.0}, r"low: must be less than high \(5.0 >= 4.0\)"),
        ({"kind": "minmax", "low": [0.0, 0.0, 0.0]}, "low: 3 of them, but the images have 2 channels"),
        ({"kind": ["minmax", "log2"]}, "kind: must be one of auto, range"),
        ({"kind": "sqrt"}, r"kind: sqrt is for values >= 0, the data go down to -\d.* \(channel 1\)"),
    ],
)
def test_a_wrong_transform_names_the_key_and_the_channel(tmp_path, transform, words):
    with pytest.raises(InputError, match=rf"value_transform.{words}"):
        train, config = fields(tmp_path, value_transform=ValueTransformConfig(**transform))
        check(config)
        splits.fit_transform(train, config)


def test_bounds_are_measured_on_the_training_split_only():
    x = np.random.default_rng(0).random((50, 1, 8, 8)).astype(np.float32)
    config = DataConfig(
        channels=1, source="-", image_size=8, value_transform=ValueTransformConfig(kind="minmax")
    )
    source = arrays.ArraySource(x, None, [], config, integer=False)
    train, val = splits.split(source, config)
    x[val.indices] = 1000
    transform = splits.fit_transform(train, config)
    assert transform.config["high"] == pytest.approx(x[train.indices].max())
    assert transform(torch.from_numpy(x[train.indices])).abs().max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bounds", [{}, {"kind": "range", "low": 0, "high": 1}])
def test_values_that_are_no_numbers_are_refused(bad, bounds):
    x = np.random.default_rng(0).random((50, 1, 8, 8)).astype(np.float32)
    transform = ValueTransformConfig(**bounds)
    config = DataConfig(channels=1, source="here", image_size=8, value_transform=transform)
    source = arrays.ArraySource(x, None, [], config, integer=False)
    train, _ = splits.split(source, config)
    x[train.indices[3], 0, 2, 2] = bad
    if bounds:
        splits.fit_transform(train, config)  # reads nothing: the drafts of a plan guess their bounds
    look = splits.look_through if bounds else splits.fit_transform
    with pytest.raises(InputError, match=f"image {train.indices[3]} has values that are not finite"):
        look(train, config)


@pytest.mark.parametrize(
    ("values", "named"), [((0.0, 0.8), "from 0 to 0.8"), ((250.0, 700.0), "from 250 to 700"), ((1, 200), "")]
)
def test_files_of_floats_that_are_no_grey_levels_are_not_taken_for_black_or_white(tmp_path, values, named):
    for number in range(4):
        plane = np.linspace(*values, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(plane).save(tmp_path / f"{number}.tiff")
    config = DataConfig(channels=1, source=str(tmp_path), image_size=8)
    train, _ = splits.split(sources.open_source(config), config)
    if named:
        with pytest.raises(InputError, match=f"{named}, no grey levels of 0 to 255: .*kind=minmax"):
            splits.fit_transform(train, config)
        config.value_transform.kind = "minmax"
    x = splits.fit_transform(train, config)(train.__getitems__([0])["raw"])
    assert x.min() < -0.9 and (x.max() > 0.5 or not named)


def test_a_photo_with_damaged_exif_is_passed_over(tmp_path, capsys):
    write_images(tmp_path, 30)
    turned_and_a_number_as_text = (
        b"Exif\0\0II*\0\x08\0\0\0\x02\0"
        + struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
        + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
        + b"\0\0\0\0"
    )
    Image.new("RGB", (20, 24)).save(tmp_path / "9.jpg", exif=turned_and_a_number_as_text)
    data = DataConfig(channels=3, source=str(tmp_path), image_size=8, max_bad_fraction=0.1)
    read = sources.open_source(data).read(list(range(31)))
    assert sum(image is None for image in read) == 1
    assert "9.jpg is not a readable image" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2, 3, 10, 1797])
def test_split_is_disjoint_and_complete(count):
    config = DataConfig(channels=1, image_size=8)
    train, val = splits.split(
        arrays.ArraySource(np.zeros((count, 8, 8), np.uint8), None, [], config, True), config
    )
    assert len(val) >= 1 and len(train) >= 1
    assert sorted([*train.indices, *val.indices]) == list(range(count))


def test_few_images_of_many_are_taken_evenly_and_a_limit_by_chance():
    """Of sources that are sorted by class."""
    assert splits.evenly(100, 5) == [0, 24, 49, 74, 99] and splits.evenly(3, 9) == [0, 1, 2]
    config = DataConfig(channels=1, image_size=8, limit=20)
    source = arrays.ArraySource(np.zeros((100, 8, 8), np.uint8), None, [], config, True)
    taken = np.concatenate([part.indices for part in splits.split(source, config)])
    assert len(taken) == 20 and np.histogram(taken, 4, (0, 100))[0].min() >= 2


@pytest.mark.parametrize(("count", "batch"), [(100, 7), (5, 8), (3, 8), (64, 64)])
def test_every_image_is_seen_equally_often(count, batch):
    order = batches.BatchOrder(count, batch, seed=1)
    seen = np.concatenate([order(step) for step in range(count)])  # exactly `batch` epochs
    assert (np.bincount(seen, minlength=count) == batch).all()
    assert len(order(0)) == batch


def test_batches_are_a_function_of_seed_and_step():
    a, b = batches.BatchOrder(100, 8, 1), batches.BatchOrder(100, 8, 1)
    for step in range(30):
        a(step)
    np.testing.assert_array_equal(a(13), b(13))
    assert not np.array_equal(a(13), batches.BatchOrder(100, 8, 2)(13))


def test_shares_of_all_processes_make_up_the_batch(tiny):
    from shared.training.config import TrainConfig

    order, config = (
        batches.BatchOrder(100, 24, 1),
        TrainConfig(batch_size=24, grad_accumulation=3, max_steps=1),
    )
    shares = [list(batches._Shares(order, config, range(5, 7), rank, 2)) for rank in range(2)]
    assert [len(s) for s in shares] == [6, 6]
    rows = sorted((start, stop, tuple(p)) for share in shares for [(start, stop, p)] in share[:3])
    assert [r[:2] for r in rows] == [(i, i + 4) for i in range(0, 24, 4)]
    np.testing.assert_array_equal(np.concatenate([r[2] for r in rows]), order(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_batches(workers):
    from types import SimpleNamespace

    from shared.training.config import TrainConfig

    config = DataConfig(source="digits", channels=1, image_size=8, num_workers=workers)
    train, _ = splits.split(sources.open_source(config), config)
    alone = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    order = batches.BatchOrder(len(train), 16, 3)
    for step, batch in enumerate(
        batches.batches(train, TrainConfig(batch_size=16, max_steps=1), 3, 0, 4, alone)
    ):
        np.testing.assert_array_equal(
            batch["raw"].numpy(), np.stack(train.source.read(train.indices[order(step)].tolist()))
        )
        assert batch["rows"] == slice(0, 16)


# ---------------------------------------------------------------- real data


@pytest.mark.data
def test_real_sets_load(data_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mnist = sources.open_source(
        DataConfig(channels=1, source=str(data_sets / "mnist"), image_size=32, resize="pad")
    )
    assert len(mnist) == 60_000 and len(mnist.names) == 10 and mnist.read([5])[0].shape == (1, 32, 32)
    photos = sources.open_source(
        DataConfig(source=str(data_sets / "clothing128"), image_size=128, channels=3)
    )
    assert photos.read([0])[0].shape == (3, 128, 128)
    config = DataConfig(source=str(data_sets / "jets"), image_size=64, channels=3, limit=200)
    jets = sources.open_source(config)
    assert len(jets) == 10_000 and jets.names == ["0", "1"]
    assert splits.fit_transform(splits.split(jets, config)[0], config).config["low"] == [0, 0, 0]


def test_patches_of_an_image_stay_in_one_split(tmp_path):
    fields = np.arange(6 * 16 * 16, dtype=np.float32).reshape(6, 16, 16)
    np.savez(tmp_path / "fields.npz", x=fields, label=np.arange(6))
    config = DataConfig(
        source=str(tmp_path / "fields.npz"), image_size=8, channels=1, resize="patches", val_fraction=0.34
    )
    train, val = splits.split(sources.open_source(config), config)
    assert (len(train), len(val)) == (4 * 25, 2 * 25)  # corners 0, 2, ... 8 in both directions
    seen, held_out = (
        {int(v) // 256 for v in part.__getitems__(list(range(len(part))))["raw"].flatten()}
        for part in (train, val)
    )
    assert len(seen) == 4 and len(held_out) == 2 and not seen & held_out
    batch = train.__getitems__([7])
    assert batch["raw"].shape == (1, 1, 8, 8)
    field = int(batch["label"][0])
    np.testing.assert_array_equal(batch["raw"][0, 0], fields[field, 2:10, 4:12])


def test_slices_of_a_file_stay_in_one_split(tmp_path):
    """Neighbouring slices of a volume are nearly the same image; large volumes cannot be spared."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((120, 8, 8)))
    data = DataConfig(source=str(tmp_path / "x.npy"), image_size=8, channels=1, val_fraction=0.1)
    equal, few = np.arange(120) // 10, np.arange(120) // 40
    one_large = np.concatenate([np.zeros(80, int), 1 + np.arange(40) // 8])
    single = np.arange(120)
    for files, held, apart in (
        (equal, 20, True),
        (few, 12, False),
        (one_large, 16, True),
        (single, 12, True),
    ):
        names = [f"{file}.nii,{row}" for row, file in enumerate(files)]
        (tmp_path / "x.csv").write_text("\n".join(["file,slice", *names]) + "\n")
        parts = splits.split(sources.open_source(data), data)
        training, held_out = ({int(files[row]) for row in part.indices} for part in parts)
        assert sorted(np.concatenate([part.indices for part in parts])) == list(range(120))
        assert len(parts[1]) == held and (not training & held_out) == apart
        data.limit = 60
        assert sum(map(len, splits.split(sources.open_source(data), data))) == 60
        data.limit = None
    (tmp_path / "x.csv").write_bytes(b"file\xff\xfe")
    data.label_column = None
    assert len(sources.open_source(data)) == 120  # nobody asked for that table


def test_patches_that_do_not_fit(tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((4, 16, 16), np.uint8))
    with pytest.raises(InputError, match="patches of 32x32 px cannot be cut from images of 16x16"):
        sources.open_source(
            DataConfig(channels=1, source=str(tmp_path / "small.npy"), image_size=32, resize="patches")
        )
    with pytest.raises(InputError, match="data.resize: patches are cut from arrays"):
        inspect_source(DataConfig(channels=1, source="digits", resize="patches"))
