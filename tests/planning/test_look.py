"""What is seen of sets of images, ordinary and odd ones. Real files."""

import math

import numpy as np
import pytest
from PIL import Image

from shared.config import InputError
from shared.planning.look import look
from tests.conftest import write_images


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_of_photos_with_classes_in_folders_of_folders(tmp_path):
    for number, name in enumerate(("a/cats", "a/dogs", "b/birds")):
        (tmp_path / name).mkdir(parents=True)
        for image in range(10 if number else 2):
            Image.fromarray(noise(30, 40, 3, seed=100 * number + image)).save(
                tmp_path / name / f"{image}.png"
            )
    found = look(str(tmp_path), {})
    assert (found.count, found.height, found.width, found.channels) == (22, 30, 40, 3)
    assert found.classes == {"birds": 10, "cats": 2, "dogs": 10}
    assert found.uniform and found.alike == 1 and not found.unreadable and not found.duplicates


def test_files_that_are_not_there_and_animations_are_said(tmp_path, capsys):
    write_images(tmp_path / "images", 12)
    (tmp_path / "metadata.csv").write_text("file_name,kind\n" + "".join(f"{n}.png,a\n" for n in range(12)))
    with pytest.raises(InputError, match="there is no such file"):
        look(str(tmp_path), {})
    (tmp_path / "metadata.csv").unlink()
    frames = [Image.fromarray(noise(30, 40, 3, seed=seed)) for seed in range(3)]
    for kind in ("gif", "webp", "png"):
        frames[0].save(tmp_path / "images" / f"moving.{kind}", save_all=True, append_images=frames[1:])
    assert look(str(tmp_path), {}).count == 15
    assert "3 of 15 are animations: the first frame is taken" in capsys.readouterr().out


def test_of_a_large_picture_a_smaller_version_is_looked_at(tmp_path):
    for number in range(12):
        values = np.zeros((1100, 1600, 4), np.uint8)
        values[100:-100, 100:-100] = (number, 200, 30, 255)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    found = look(str(tmp_path), {})
    assert (found.height, found.width, found.channels, found.framed) == (1100, 1600, 4, True)
    assert found.brightest == 200


def test_a_column_of_few_words_is_the_class(tmp_path):
    write_images(tmp_path, 24)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    rows = [f"{name},thing number {n},{'ab'[n % 2]}" for n, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,kind", *rows]) + "\n")
    found = look(str(tmp_path), {})
    assert found.label_column == "kind" and found.classes == {"a": 12, "b": 12}
    assert look(str(tmp_path), {"data.label_column": None}).classes is None


def test_what_else_could_be_classes_is_said(tmp_path, capsys):
    write_images(tmp_path, 24)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    rows = [
        f"{name},{('train', 'test')[n % 2]},{'abc'[n % 3]},{'xyzw'[n % 4]},{'uv'[n % 2] if n else ''}"
        for n, name in enumerate(names)
    ]
    table = tmp_path / "metadata.csv"
    table.write_text("\n".join(["file_name,split,kind,place,hand", *rows]) + "\n")
    assert look(str(tmp_path), {}).label_column == "kind"  # not the split, though it has fewer
    said = capsys.readouterr().out
    assert "classes by kind; data.label_column=NAME takes another column: place" in said
    assert "the column hand could be classes, but 1 images have none" in said
    table.write_text(table.read_text().replace("hand", "label"))
    assert look(str(tmp_path), {"data.label_column": None}).classes is None
    capsys.readouterr()
    assert look(str(tmp_path), {}).label_column == "kind"
    assert "the column label is no class: some images have none" in capsys.readouterr().out


def tiffs(folder, *arrays):
    folder.mkdir()
    for number, values in enumerate(arrays):
        Image.fromarray(values).save(folder / f"{number:02}.tif")
    return str(folder)


def test_values_of_files_that_are_no_grey_levels_are_one_line(tmp_path):
    rng = np.random.default_rng(0)
    heights = [rng.normal(0, 1000, (16, 16)).astype(np.float32) for _ in range(20)]
    source = tiffs(tmp_path / "heights", *heights)
    with pytest.raises(InputError, match=r"has values from -\d+.* no grey levels: python -m shared.convert"):
        look(source, {})
    assert look(source, {"data.value_transform.kind": "minmax"}).count == 20
    broken = [np.where(n % 4, image / 100 + 128, np.nan) for n, image in enumerate(heights)]
    found = look(tiffs(tmp_path / "broken", *(image.astype(np.float32) for image in broken)), {})
    assert len(found.unreadable) == 5 and "not finite" in found.unreadable[0]


def test_pages_that_are_not_read_are_said(tmp_path, capsys):
    tmp_path.joinpath("stacks").mkdir()
    for number in range(4):
        pages = [Image.fromarray(noise(16, 16, 3, seed=10 * number + page)) for page in range(3)]
        pages[0].save(tmp_path / f"stacks/{number}.tif", save_all=True, append_images=pages[1:])
    assert look(str(tmp_path / "stacks"), {}).count == 4
    assert "TIFF files of up to 3 pages: the first is taken" in capsys.readouterr().out


def test_channels_are_told_by_the_pixels(tmp_path):
    clear = noise(20, 20, 4)
    clear[:, :, 3] = 255
    through = clear.copy()
    through[:5, :, 3] = 0
    grey = np.repeat(noise(20, 20, 1), 3, axis=2)
    for name, image, channels in (("clear", clear, 3), ("through", through, 4), ("grey", grey, 1)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            Image.fromarray(np.roll(image, number, 0)).save(folder / f"{number}.png")
        assert look(str(folder), {}).channels == channels, name


def test_depth_duplicates_and_unreadable_files_are_seen(tmp_path):
    for number in range(20):
        values = np.random.default_rng(min(number, 17)).integers(0, 65536, (16, 24)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number:02}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "00.png").read_bytes()[:60])
    found = look(str(tmp_path), {})
    assert found.deep and found.duplicates == 2 and found.channels == 1
    assert found.unreadable == ("torn.png (image file is truncated)",) and found.looked == 21


def test_a_folder_without_a_readable_image_is_one_line(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 3 images can be read, such as"):
        look(str(tmp_path), {})


def test_photos_of_which_only_the_heads_can_be_read_are_one_line(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(20):
        path = tmp_path / "photos" / f"{number}.jpg"
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"none of 20 images can be read, such as .*\.jpg"):
        look(str(tmp_path / "photos"), {})


def test_an_upright_photo_is_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        Image.fromarray(noise(30, 60, 3, seed=number)).save(tmp_path / f"{number}.jpg", exif=exif)
    found = look(str(tmp_path), {})
    assert (found.height, found.width) == (60, 30)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((9, 64, 32, 32), (32, 32, 64)), ((9, 32, 32, 64), (32, 32, 64)), ((9, 40, 12, 12), (12, 12, 40))],
)
def test_many_channels_leave_squares(shape, wanted, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    found = look(str(tmp_path / "x.npy"), {})
    assert (found.height, found.width, found.channels) == wanted


def test_an_array_that_cannot_be_is_one_line(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((40, 16, 16), np.float32))
    with pytest.raises(InputError, match=r"data.channels: 3, but the array in .* \(40, 16, 16\)"):
        look(str(tmp_path / "x.npy"), {"data.channels": 3})
    np.save(tmp_path / "none.npy", np.zeros((0, 16, 16), np.float32))
    with pytest.raises(InputError, match="holds 0 images"):
        look(str(tmp_path / "none.npy"), {})


def test_one_channel_of_another_unit_makes_no_long_tail(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.normal(280, 10, (60, 3, 16, 16))
    x[:, 1] = 1e5 * draw.exponential(size=(60, 16, 16)) * (draw.random((60, 16, 16)) < 0.1)
    np.save(tmp_path / "x.npy", x)
    found = look(str(tmp_path / "x.npy"), {})
    assert found.values.tail < 2 and found.values.zeros == 0 and found.values.reach < 2
    x[:, 0] = draw.normal(0, 1, (60, 16, 16))
    x[0, 0, 3, 3] = -1e4
    np.save(tmp_path / "y.npy", x[:, [0]])
    assert look(str(tmp_path / "y.npy"), {}).values.reach > 1e3


def test_whole_floats_in_a_column_called_so_are_classes(tmp_path, capsys):
    for number in range(12):
        Image.fromarray(noise(16, 16, 3, seed=number)).save(tmp_path / f"{number}.png")
    for column, values, classes in (
        ("label", (0.0, 1.0), {"0": 6, "1": 6}),
        ("target", (3.0, 4.0), {"3": 6, "4": 6}),
        ("label", (0.5, 1.0), None),
        ("age", (3.0, 4.0), None),
    ):
        rows = [f"{number}.png,{values[number % 2]}" for number in range(12)]
        (tmp_path / "metadata.csv").write_text("\n".join([f"file_name,{column}", *rows]))
        assert look(str(tmp_path), {}).classes == classes


@pytest.mark.parametrize("border", [0, 9])
def test_an_empty_border_is_seen(tmp_path, border):
    """In an array and in files alike."""
    x = np.random.default_rng(0).integers(10, 256, (20, 28, 28), dtype=np.uint8)
    x[:, [0, -1]] = x[:, :, [0, -1]] = border and 99
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "files").mkdir()
    for number, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / "files" / f"{number}.png")
    assert [look(str(tmp_path / name), {}).framed for name in ("x.npy", "files")] == [not border] * 2
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    assert look(str(tmp_path / "x.npy"), {}).framed == (not border)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (lambda x: x / 255, (0, 1)),
        (lambda x: (x / 127.5 - 1).astype(np.float16), (-1, 1)),
        (lambda x: x.astype(np.int64), (0, 255)),
        (lambda x: x / 128, None),
        (lambda x: (x > 99).astype(np.float32), None),
        (lambda x: np.random.default_rng(0).random(x.shape), None),
    ],
)
def test_pictures_that_were_made_floats_are_known(tmp_path, values, levels):
    x = noise(40, 3, 16, 16)
    x[0, 0, 0, 0] = 255
    np.save(tmp_path / "x.npy", values(x))
    assert look(str(tmp_path / "x.npy"), {}).values.levels == levels
    np.save(tmp_path / "x.npy", values(noise(40, 4, 16, 16)))  # four floats are no RGBA
    assert look(str(tmp_path / "x.npy"), {}).values.levels is None


def test_a_dark_set_is_seen(tmp_path):
    np.save(tmp_path / "masks.npy", noise(40, 16, 16) % 2)
    assert look(str(tmp_path / "masks.npy"), {}).brightest == 1
    (tmp_path / "deep").mkdir()
    for number in range(4):  # 12 bits in a file of 16
        values = np.random.default_rng(number).integers(0, 4096, (16, 24)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "deep" / f"{number}.png")
    assert look(str(tmp_path / "deep"), {}).brightest == 16
    assert look("digits", {}).brightest > 200


def test_files_of_which_only_heads_can_be_read_are_counted_among_all(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.planning.look.SECONDS", math.inf)
    for number in range(500):
        path = tmp_path / f"{number:03}.jpg"
        Image.fromarray(noise(40, 40, 3, seed=number)).save(path)
        if number % 10 == 0:
            path.write_bytes(path.read_bytes()[:700])
    found = look(str(tmp_path), {})
    assert (len(found.unreadable), found.looked) == (50, 500)


def test_a_label_that_is_no_class_is_left(tmp_path):
    import datasets

    images = [Image.fromarray(noise(16, 16, seed=number)) for number in range(24)]
    columns = {"image": images, "label": [[n, 2] for n in range(24)], "kind": [n % 3 - 1 for n in range(24)]}
    table = datasets.Dataset.from_dict(columns)
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train.parquet")
    assert look(str(tmp_path / "table"), {}).classes is None
    datasets.Dataset.from_dict({"image": images, "label": columns["kind"]}).to_parquet(
        tmp_path / "table" / "train.parquet"
    )
    assert look(str(tmp_path / "table"), {}).classes == {"-1": 8, "0": 8, "1": 8}  # as training takes them


@pytest.mark.parametrize("shape", [(40, 3, 40, 80), (40, 40, 80, 3), (40, 40, 80), (40, 7, 40, 80)])
def test_arrays_are_read_from_their_header(shape, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    found = look(str(tmp_path / "x.npy"), {})
    channels = 1 if len(shape) == 3 else min(shape[1], shape[3])
    assert (found.count, found.height, found.width, found.channels) == (40, 40, 80, channels)
    assert found.values.low < 0 < found.values.high and found.values.zeros == 0


def test_sparse_and_heavy_tailed_values_are_told_apart(tmp_path):
    draw = np.random.default_rng(0)
    np.save(tmp_path / "sparse.npy", draw.exponential(size=(40, 16, 16)) * (draw.random((40, 16, 16)) < 0.05))
    np.save(tmp_path / "speckle.npy", draw.exponential(size=(40, 16, 16)))
    sparse, speckle = (look(str(tmp_path / f"{name}.npy"), {}).values for name in ("sparse", "speckle"))
    assert sparse.zeros == pytest.approx(0.95, abs=0.01) and sparse.knee == pytest.approx(3, rel=0.2)
    units = draw.exponential(size=(40, 3, 16, 16)) * (draw.random((40, 3, 16, 16)) < 0.05)
    units *= np.array([1, 1e4, 0]).reshape(3, 1, 1)  # the last is empty
    np.save(tmp_path / "units.npy", units)
    found = look(str(tmp_path / "units.npy"), {}).values
    assert found.knees == pytest.approx([3, 3e4, found.knee], rel=0.2)
    assert speckle.zeros == 0 and speckle.tail == pytest.approx(6.9, rel=0.1)


def test_values_that_are_not_finite_are_named(tmp_path):
    x = np.zeros((40, 16, 16), np.float32)
    x[12, 3, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match="image 12 of .* not finite"):
        look(str(tmp_path / "x.npy"), {})


def test_mirrored_images_are_told_from_images_that_have_a_left():
    assert not look("digits", {}).mirrored


def test_images_without_a_left_may_be_mirrored(tmp_path):
    """Bright on one side: always the same, or either."""
    x = noise(400, 3, 12, 12) // 4
    x[:, :, :, :6] += noise(400, 1, 1, 6, seed=1) // 2
    np.save(tmp_path / "left.npy", x)
    x[::2] = x[::2, :, :, ::-1].copy()
    np.save(tmp_path / "either.npy", x[np.random.default_rng(0).permutation(400)])
    assert [look(str(tmp_path / name), {}).mirrored for name in ("left.npy", "either.npy")] == [False, True]
