"""Volumes and stacks of science to arrays and back: small real files, made by the libraries themselves."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from shared import convert
from shared.config import InputError
from shared.data import sources, splits
from shared.data.config import DataConfig
from shared.formats.nifti import AXES
from tests.conftest import call

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
tifffile = pytest.importorskip("tifffile")
zarr = pytest.importorskip("zarr")

RNG = np.random.default_rng(0)


def converted(source, tmp_path, *more):
    """The array and the table that the command makes."""
    call(convert.main, source, "--out", tmp_path / "out.npy", *more)
    with open(tmp_path / "out.csv", newline="") as file:
        return np.load(tmp_path / "out.npy"), list(csv.DictReader(file))


def write_dicom(path, pixels, number, slope=None, position=None):
    """One slice (H,W) or several frames (n,H,W), as a scanner writes it."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.PatientName = "1.2.3", "Somebody^Else"
    data.InstanceNumber, data.SamplesPerPixel, data.PhotometricInterpretation = number, 1, "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    if slope is not None:
        data.RescaleSlope, data.RescaleIntercept = slope
    if position is not None:
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, position]
    data.PixelData = pixels.astype("<i2").tobytes()
    data.save_as(path, enforce_file_format=True)


# ---------------------------------------------------------------- there


@pytest.mark.parametrize("shape", [(9, 12, 16), (9, 3, 12, 16), (9, 12, 16, 3)])
def test_hdf5_keeps_values_labels_and_type(shape, tmp_path):
    x = RNG.integers(0, 4000, shape).astype(np.uint16)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["entry/frames"] = x
        file["entry/labels"] = [b"gas", b"dust", b"gas"] * 3
        file["mask"] = np.zeros((12, 16))
    found, rows = converted(tmp_path / "scan.h5", tmp_path)
    assert found.dtype == np.uint16 and np.array_equal(found, x)
    assert [row["label"] for row in rows] == ["gas", "dust", "gas"] * 3 and rows[4]["slice"] == "4"


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_in_both_versions(version, tmp_path):
    x = RNG.normal(size=(70, 8, 10))
    root = zarr.open_group(tmp_path / "run.zarr", mode="w", zarr_format=version)
    root.create_array("images/x", data=x, chunks=(16, 8, 10))
    root.create_array("images/label", data=np.arange(70) % 3)
    found, rows = converted(tmp_path / "run.zarr", tmp_path)
    assert found.dtype == np.float32 and np.allclose(found, x) and rows[5]["label"] == "2"


@pytest.mark.parametrize(("y", "label"), [([1.0, 0.0] * 3, "0"), (np.arange(6.0), None), ([0.5] * 6, None)])
def test_whole_numbers_that_come_twice_are_classes_and_others_a_coordinate(y, label, tmp_path):
    with h5py.File(tmp_path / "jets.h5", "w") as file:
        file["X_jets"], file["y"] = RNG.normal(size=(6, 8, 8, 3)), np.array(y)
    _, rows = converted(tmp_path / "jets.h5", tmp_path)
    assert rows[1].get("label") == label


def test_a_coordinate_that_all_files_have_is_no_class(tmp_path):
    for n in range(2):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file["x"], file["y"] = RNG.normal(size=(20, 8, 8)), np.arange(20.0)
    _, rows = converted(tmp_path, tmp_path)
    assert "label" not in rows[0] and rows[21]["y"] == "1.0"


def test_names_are_labels_in_zarr_and_a_single_image_takes_no_coordinate_for_one(tmp_path):
    root = zarr.open_group(tmp_path / "run.zarr", mode="w", zarr_format=2)
    root.create_array("x", data=RNG.normal(size=(3, 8, 10)))
    root.create_array("label", shape=(3,), dtype="str")[:] = np.array(["gas", "dust", "gas"], dtype=object)
    _, rows = converted(tmp_path / "run.zarr", tmp_path)
    assert [row["label"] for row in rows] == ["gas", "dust", "gas"]
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["image"], file["y"] = RNG.normal(size=(8, 10)), np.arange(8.0)
    found, rows = converted(tmp_path / "one.h5", tmp_path)
    assert found.shape == (1, 8, 10) and "label" not in rows[0]


@pytest.mark.parametrize(
    ("shape", "each"),
    [((12, 16), 1), ((3, 12, 16), 1), ((12, 16, 3), 1), ((17, 18, 20), 17), ((2, 3, 12, 16), 2)],
)
def test_an_npy_for_each_image_in_a_folder_for_each_class(shape, each, tmp_path, capsys):
    x = {f"{kind}/{n}": RNG.normal(size=shape) for kind in ("gas", "dust") for n in (2, 10, 1)}
    for name, values in x.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "set" / f"{name}.npy", values)
    out = tmp_path / "set" / "all.npy"
    for _ in range(2):  # what was written is no image the second time
        call(convert.main, tmp_path / "set", "--out", out)
        with open(out.with_suffix(".csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        stacked = np.stack if each == 1 else np.concatenate
        wanted = stacked([x[f"{kind}/{n}"] for kind in ("dust", "gas") for n in (1, 2, 10)])
        assert np.load(out).dtype == np.float32 and np.allclose(np.load(out), wanted)
        assert [row["label"] for row in rows] == ["dust"] * 3 * each + ["gas"] * 3 * each
    channels = "each of 6 files is taken for an image of 3 channels"
    assert (channels in capsys.readouterr().out) == (3 in shape and len(shape) == 3)
    with pytest.raises(InputError, match="holds nothing of"):
        call(convert.main, out, "--out", out)


def test_shards_of_other_lengths_are_stacks_and_what_lies_beside_them_is_left(tmp_path):
    """A last one of three is no image of three channels, and labels are none at all."""
    x = RNG.normal(size=(43, 12, 16)).astype(np.float32)
    for n, rows in enumerate((slice(0, 20), slice(20, 40), slice(40, 43))):
        np.save(tmp_path / f"{n}.npy", x[rows])
    np.save(tmp_path / "y.npy", np.zeros(43))
    assert np.array_equal(converted(tmp_path, tmp_path)[0], x)
    call(convert.main, tmp_path, "--out", tmp_path / "again.npy")  # not what was converted before
    assert np.array_equal(np.load(tmp_path / "again.npy"), x)
    for shape in ((10, 12, 12), (40, 24, 12)):  # a stack beside its labels; shards of small images
        place = tmp_path / "x".join(map(str, shape))
        place.mkdir()
        np.save(place / "x.npy", np.zeros(shape))
        np.save(place / "y.npy", np.zeros(shape[0]))
        assert converted(place, tmp_path)[0].shape == shape
    for n in range(2):
        (tmp_path / "small").mkdir(exist_ok=True)
        np.save(tmp_path / "small" / f"{n}.npy", np.zeros((30, 8, 8)))
    assert converted(tmp_path / "small", tmp_path)[0].shape == (60, 8, 8)
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        np.save(tmp_path / "set" / split / "0.npy", x)
    with pytest.raises(InputError, match="holds the splits test and train: name one, such as .*set/train"):
        converted(tmp_path / "set", tmp_path)


def test_a_label_for_each_file_is_of_classes_where_all_files_say_so(tmp_path):
    for n in range(6):
        np.savez(tmp_path / f"{n}.npz", x=np.full((8, 8), n), y=float(n % 2), meta=np.array({"run": n}))
    np.savez(tmp_path / "labels.npz", y=np.zeros(6))
    found, rows = converted(tmp_path, tmp_path)
    assert [row["label"] for row in rows] == ["0", "1"] * 3 and found.max() == 5


def test_npz_files_with_their_labels_and_none_where_other_formats_are(tmp_path):
    x = RNG.integers(0, 255, (3, 12, 16)).astype(np.uint8)
    for n, label in enumerate(("gas", "dust", "gas")):
        np.savez(tmp_path / f"{n}.npz", image=x[n], label=label, weights=np.ones(3))
    found, rows = converted(tmp_path, tmp_path)
    assert found.dtype == np.uint8 and np.array_equal(found, x)
    assert [row["label"] for row in rows] == ["gas", "dust", "gas"]
    np.savez(tmp_path / "3.npz", image=x[:2, :8], other=x[:2, :8])
    with pytest.raises(InputError, match="3.npz: --dataset: say which: image, other"):
        converted(tmp_path, tmp_path)
    (tmp_path / "3.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:100])
    with pytest.raises(InputError, match="3.npz: cannot be read"):
        converted(tmp_path, tmp_path)
    tifffile.imwrite(tmp_path / "page.tif", x[0])
    found, _ = converted(tmp_path, tmp_path)
    assert np.array_equal(found, x[:1])


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint64, np.float64, np.float16])
def test_what_generate_leaves_and_every_type_become_a_volume(dtype, tmp_path):
    x = RNG.integers(0, 2, (5, 1, 8, 10)).astype(dtype)
    np.savez(tmp_path / "samples.npz", x=x, label=np.zeros(5))
    call(convert.main, tmp_path / "samples.npz", "--out", tmp_path / "back.nii")
    volume = nibabel.load(tmp_path / "back.nii").get_fdata()
    assert volume.shape == (10, 8, 5) and volume.sum() == x.sum()
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(InputError, match="empty.npy: cannot be read"):
        call(convert.main, tmp_path / "empty.npy", "--out", tmp_path / "empty.nii")


@pytest.mark.parametrize("axis", AXES)
def test_nifti_slices_are_upright_in_the_units_of_the_file_and_come_back(axis, tmp_path):
    """A voxel of its own value lies where its coordinates say, for each axis and orientation of the file."""
    volume = RNG.normal(50, 10, (7, 9, 11)).astype(np.float32)
    volume[5, 7, 9] = 1000  # right, front and top
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])  # the file counts from the right
    image = nibabel.Nifti1Image(volume[::-1].copy(), affine)
    nibabel.save(image, tmp_path / "head.nii.gz")
    found, rows = converted(tmp_path / "head.nii.gz", tmp_path, "--axis", axis)
    place, height, width = {"sagittal": (5, 11, 9), "coronal": (7, 11, 7), "axial": (9, 9, 7)}[axis]
    assert found.shape[1:] == (height, width) and rows[place]["position"] == str(place)
    _, row, column = np.argwhere(found == 1000)[0]
    assert found[place].max() == 1000 and row < height / 2 < column + 1  # up, and to the right or the front
    back = tmp_path / "back.nii.gz"
    arguments = ("--axis", axis, "--like", tmp_path / "head.nii.gz")
    call(convert.main, tmp_path / "out.npy", "--out", back, *arguments)
    again = nibabel.load(back)
    assert np.array_equal(again.get_fdata(dtype=np.float32), volume)
    assert np.allclose(again.affine, nibabel.as_closest_canonical(image).affine)


def test_nifti_scaled_and_in_time(tmp_path):
    raw = RNG.integers(0, 100, (6, 8, 4, 3)).astype(np.int16)
    image = nibabel.Nifti1Image(raw, np.eye(4))
    image.header.set_slope_inter(0.5, -20)
    nibabel.save(image, tmp_path / "bold.nii")
    stored = nibabel.load(tmp_path / "bold.nii").get_fdata(dtype=np.float32)
    found, rows = converted(tmp_path / "bold.nii", tmp_path)
    assert found.shape == (12, 8, 6) and (rows[5]["position"], rows[5]["time"]) == ("1", "1")
    assert np.array_equal(found[5], stored[:, :, 1, 1].T[::-1])


def test_dicom_is_sorted_along_the_patient_and_rescaled(tmp_path):
    x = RNG.integers(-100, 2000, (5, 10, 12)).astype(np.int16)
    for index in (3, 0, 4, 1, 2):  # the names and the numbers say nothing of the order
        name = tmp_path / "scan" / "ct" / f"{(index * 3) % 5}"
        name.parent.mkdir(parents=True, exist_ok=True)
        write_dicom(name, x[index], number=5 - index, slope=(2.0, -1024.0), position=2.5 * index)
    (tmp_path / "scan" / "notes.txt").write_text("not an image")
    found, rows = converted(tmp_path / "scan", tmp_path)
    assert found.dtype == np.float32 and np.array_equal(found, x * 2.0 - 1024)
    assert [float(row["position"]) for row in rows] == [0, 2.5, 5, 7.5, 10]
    assert "Somebody" not in (tmp_path / "out.csv").read_text()


def test_dicom_in_which_the_least_is_white_is_turned_round(tmp_path):
    x = RNG.integers(-100, 2000, (6, 8)).astype(np.int16)
    for name, kind in (("one", "MONOCHROME1"), ("palette", "PALETTE COLOR")):
        write_dicom(tmp_path / f"{name}.dcm", x, number=1)
        data = pydicom.dcmread(tmp_path / f"{name}.dcm")
        data.PhotometricInterpretation = kind
        data.save_as(tmp_path / f"{name}.dcm")
    found, _ = converted(tmp_path / "one.dcm", tmp_path)
    assert found.dtype == np.int16 and np.array_equal(found[0], -1 - x)
    for name, changes, expected in (
        ("radiograph", {"PixelRepresentation": 0, "BitsStored": 12, "HighBit": 11}, 4095 - abs(x)),
        ("density", {"RescaleSlope": 2, "RescaleIntercept": 1}, 2 * abs(x) + 1),
    ):
        write_dicom(tmp_path / f"{name}.dcm", abs(x), number=1)
        data = pydicom.dcmread(tmp_path / f"{name}.dcm")
        for key, value in (changes | {"PhotometricInterpretation": "MONOCHROME1"}).items():
            setattr(data, key, value)
        data.save_as(tmp_path / f"{name}.dcm")
        assert np.array_equal(converted(tmp_path / f"{name}.dcm", tmp_path)[0][0], expected)
    with pytest.raises(InputError, match="palette.dcm: its pixels are places in a palette"):
        converted(tmp_path / "palette.dcm", tmp_path)


def test_a_table_of_the_user_s_own_is_kept(tmp_path):
    write_dicom(tmp_path / "scan.dcm", RNG.integers(0, 9, (6, 8)).astype(np.int16), number=1)
    for _ in range(2):  # its own table is replaced
        converted(tmp_path / "scan.dcm", tmp_path)
    (tmp_path / "out.csv").write_text("patient,age\n1,44\n")
    with pytest.raises(InputError, match="out.npy is there already, and was not converted"):
        converted(tmp_path / "scan.dcm", tmp_path)
    (tmp_path / "out.npy").unlink()
    with pytest.raises(InputError, match="out.csv is there already, and was not converted"):
        converted(tmp_path / "scan.dcm", tmp_path)
    assert "44" in (tmp_path / "out.csv").read_text()


def test_dicom_of_several_frames_stays_in_its_type(tmp_path):
    x = RNG.integers(-5, 500, (4, 6, 8)).astype(np.int16)
    write_dicom(tmp_path / "cine.dcm", x, number=1)
    found, _ = converted(tmp_path / "cine.dcm", tmp_path)
    assert found.dtype == np.int16 and np.array_equal(found, x)


def test_dicom_whose_units_stand_elsewhere_is_one_line(tmp_path):
    """Enhanced images have them with each frame, parametric maps have no whole numbers."""
    from pydicom.sequence import Sequence

    x = np.zeros((2, 6, 8), np.int16)
    write_dicom(tmp_path / "enhanced.dcm", x, number=1)
    data = pydicom.dcmread(tmp_path / "enhanced.dcm")
    data.SharedFunctionalGroupsSequence = Sequence([pydicom.Dataset()])
    data.save_as(tmp_path / "enhanced.dcm")
    write_dicom(tmp_path / "floats.dcm", x, number=1)
    data = pydicom.dcmread(tmp_path / "floats.dcm")
    del data.PixelData
    data.FloatPixelData, data.BitsAllocated = np.full(96, 0.7, "<f4").tobytes(), 32
    data.save_as(tmp_path / "floats.dcm")
    write_dicom(tmp_path / "flat.dcm", x, number=1, position=1.0)
    data = pydicom.dcmread(tmp_path / "flat.dcm")
    data.ImagePositionPatient = [0, 0]
    data.save_as(tmp_path / "flat.dcm")
    for name, line in (
        ("enhanced", "units stand with each frame"),
        ("floats", "floating-point numbers"),
        ("flat", "flat.dcm: cannot be read"),
    ):
        with pytest.raises(InputError, match=line):
            call(convert.main, tmp_path / f"{name}.dcm", "--out", tmp_path / "out.npy")
    assert not list(tmp_path.glob("*out.*"))


def test_tiff_stacks_of_any_axes_and_sub_folders_as_classes(tmp_path):
    x = RNG.integers(0, 60000, (2, 5, 8, 10)).astype(np.uint16)
    for name, one in zip(("healthy", "ill"), x, strict=True):
        (tmp_path / "cells" / name).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "cells" / name / "stack.tif", one, photometric="minisblack")
    found, rows = converted(tmp_path / "cells", tmp_path)
    assert np.array_equal(found, x.reshape(10, 8, 10)) and rows[7] == {
        "file": "ill/stack.tif", "slice": "2", "label": "ill",
    }  # fmt: skip
    many = RNG.normal(size=(3, 4, 8, 10)).astype(np.float32)  # planes, channels
    tifffile.imwrite(tmp_path / "many.tif", many, imagej=True, metadata={"axes": "ZCYX"})
    assert np.array_equal(converted(tmp_path / "many.tif", tmp_path)[0], many)


def test_what_was_converted_is_a_source_with_its_labels(tmp_path):
    x = RNG.normal(300, 20, (40, 16, 16)).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"], file["label"] = x, np.arange(40) % 2 * 10
    call(convert.main, tmp_path / "x.h5", "--out", tmp_path / "x.npy")
    data = DataConfig(source=str(tmp_path / "x.npy"), image_size=16, channels=1)
    source = sources.open_source(data)
    assert source.names == ["0", "10"] and splits.whole(source).labels([1, 2]).tolist() == [1, 0]
    by_file = sources.open_source(DataConfig(**{**vars(data), "label_column": "file"}))
    assert by_file.names == ["x.h5"]
    with pytest.raises(
        InputError, match=r"data.label_column: .*x\.csv has no column 'kind', only file, slice"
    ):
        sources.open_source(DataConfig(**{**vars(data), "label_column": "kind"}))


# ---------------------------------------------------------------- damaged, hostile, wrong


def test_damaged_files_are_one_line_each_and_leave_nothing(tmp_path):
    for name in ("a.h5", "b.nii.gz", "c.dcm", "d.tif", "e.nii"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 40)
        with pytest.raises(InputError, match=f"{name}: cannot be read") as told:
            call(convert.main, tmp_path / name, "--out", tmp_path / "out.npy")
        assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("*out.*"))


@pytest.mark.parametrize("kind", ["h5", "nii.gz", "dcm", "tif"])
def test_a_file_cut_off_is_one_line_and_leaves_nothing(kind, tmp_path):
    x = RNG.integers(0, 3000, (6, 40, 40)).astype(np.int16)
    path = tmp_path / f"x.{kind}"
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=x, chunks=(1, 40, 40), compression="gzip")
    elif kind == "dcm":
        write_dicom(path, x, 1)
    elif kind == "tif":
        tifffile.imwrite(path, x, photometric="minisblack", compression="zlib")
    else:
        nibabel.save(nibabel.Nifti1Image(x, np.eye(4)), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(InputError, match=f"x.{kind}") as told:
        call(convert.main, path, "--out", tmp_path / "out.npy")
    assert "\n" not in str(told.value) and not list(tmp_path.glob("*out.*"))


def test_a_head_that_claims_more_than_the_disk_holds_is_one_line(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", shape=(10**9, 1000, 1000), chunks=(1, 1000, 1000), dtype="f4")
    with pytest.raises(InputError, match="1,000,000,000 x 1,000 x 1,000 values need .* free there"):
        call(convert.main, tmp_path / "x.h5", "--out", tmp_path / "out.npy")


def test_what_lies_in_another_file_is_not_opened(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", shape=(1, 8, 8), dtype="u1", external=[(str(tmp_path / "secret"), 0, 64)])
        file["far"] = h5py.ExternalLink(str(tmp_path / "y.h5"), "/x")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(shape=(1, 8, 8), dtype="u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "y.h5"), "x", shape=(1, 8, 8))
        file.create_virtual_dataset("x", layout)
    for name in ("x.h5", "virtual.h5"):
        with pytest.raises(InputError, match="x lies in another file, which is not opened"):
            call(convert.main, tmp_path / name, "--out", tmp_path / "out.npy")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="holds nothing of"):
        call(convert.main, tmp_path / "folder", "--out", tmp_path / "out.npy")


def test_a_codec_that_could_run_code_is_not_run(tmp_path):
    root = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=2)
    root.create_array("x", data=np.zeros((4, 8, 8)), compressors=None)
    meta = tmp_path / "x.zarr" / "x" / ".zarray"
    tree = json.loads(meta.read_text()) | {"compressor": {"id": "pickle", "protocol": 5}}
    meta.write_text(json.dumps(tree))
    (tmp_path / "x.zarr" / ".zmetadata").unlink(missing_ok=True)
    with pytest.raises(InputError, match="x.zarr: .*pick"):
        call(convert.main, tmp_path / "x.zarr", "--out", tmp_path / "out.npy")


def test_contradictions_are_one_line(tmp_path):
    x = RNG.normal(size=(3, 8, 8))
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b"], file["names"] = x, x, ["one"]
    with h5py.File(tmp_path / "five.h5", "w") as file:
        file["x"] = np.zeros((2, 2, 2, 4, 4))
    with h5py.File(tmp_path / "z.h5", "w") as file:
        file["x"] = np.zeros((2, 4, 4), np.complex64)
    np.save(tmp_path / "stack.npy", np.zeros((3, 2, 8, 8)))
    out = ("--out", tmp_path / "out.npy")
    for arguments, line in (
        (["two.h5", *out], "--dataset: say which: a, b"),
        (["two.h5", *out, "--dataset", "c"], "there is no 'c'; there are a, b, names"),
        (["five.h5", *out], "an array of shape"),
        (["z.h5", *out], "no array of images"),
        (["nowhere", *out], "no such file or folder"),
        (["two.h5", "--out", tmp_path / "out.png"], "neither FILE.npy"),
        (["stack.npy", "--out", tmp_path / "out.nii"], "a volume is made of N,H,W"),
        (["two.h5", "--out", tmp_path / "out.nii"], "cannot be read"),
    ):
        with pytest.raises(InputError, match=line):
            call(convert.main, tmp_path / arguments[0], *arguments[1:])
    (tmp_path / "mixed").mkdir()
    for side in (8, 9):
        tifffile.imwrite(
            tmp_path / "mixed" / f"{side}.tif", np.zeros((2, side, 8), np.uint8), photometric="minisblack"
        )
    with pytest.raises(InputError, match="9.tif: slices of 9x8, but of 8x8 in .*8.tif"):
        call(convert.main, tmp_path / "mixed", *out)


def test_a_recipe_that_reads_none_of_it_imports_none_of_it():
    code = (
        "import sys, shared.trained, stage1_vae.train, shared.data.arrays; "
        "assert not {'h5py', 'zarr', 'nibabel', 'pydicom', 'tifffile'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiff_frames_written_one_by_one_are_all_there(tmp_path):
    """Each is a series of its own, as libraries write them by default."""
    frames = RNG.integers(0, 256, (12, 8, 9), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "movie.tif") as file:
        for frame in frames:
            file.write(frame, photometric="minisblack")
    x, _ = converted(tmp_path / "movie.tif", tmp_path)
    assert np.array_equal(x, frames)
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as file:
        file.write(frames[0], photometric="minisblack")
        file.write(frames[0, :4], photometric="minisblack")
    with pytest.raises(InputError, match="2 series of pages that differ"):
        converted(tmp_path / "mixed.tif", tmp_path)


def test_tiff_that_is_white_where_it_is_least_is_turned_round_and_a_palette_refused(tmp_path):
    x = RNG.integers(0, 256, (8, 9), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "white.tif", x, photometric="miniswhite")
    assert np.array_equal(converted(tmp_path / "white.tif", tmp_path)[0][0], 255 - x)
    colours = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "palette.tif", x, photometric="palette", colormap=colours)
    with pytest.raises(InputError, match="palette of colours"):
        converted(tmp_path / "palette.tif", tmp_path)


def test_files_are_in_the_order_of_their_numbers_and_hidden_folders_are_left_out(tmp_path):
    folder = tmp_path / "scan"
    for number in range(1, 13):
        path = folder / f"slice{number}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, np.full((8, 9), number, np.uint8), photometric="minisblack")
    (folder / ".ipynb_checkpoints").mkdir()
    tifffile.imwrite(folder / ".ipynb_checkpoints" / "slice1.tif", np.zeros((8, 9), np.uint8))
    x, rows = converted(folder, tmp_path)
    assert x[:, 0, 0].tolist() == list(range(1, 13)) and rows[9]["file"] == "slice10.tif"


def test_folders_that_are_links_are_entered_and_a_circle_is_not(tmp_path):
    study, disk = tmp_path / "study", tmp_path / "another_disk"
    study.mkdir(), disk.mkdir()
    tifffile.imwrite(disk / "scan.tif", np.full((8, 9), 7, np.uint8), photometric="minisblack")
    zarr.save_array(disk / "scan.zarr", np.full((2, 8, 9), 8, np.uint8))
    (study / "series").symlink_to(disk)
    (study / "alone.zarr").symlink_to(disk / "scan.zarr")
    (study / "circle").symlink_to(study)
    x, rows = converted(study, tmp_path)
    assert x[:, 0, 0].tolist() == [8, 8, 7, 8, 8]
    assert [row["file"] for row in rows[::2]] == ["alone.zarr", "series/scan.tif", "series/scan.zarr"]


def test_slices_of_a_dicom_series_are_not_divided_between_the_splits(tmp_path):
    for series in range(10):
        (tmp_path / "scans" / f"{series}").mkdir(parents=True)
        for number in range(4):
            pixels = np.full((8, 8), series, np.int16)
            write_dicom(tmp_path / "scans" / f"{series}" / f"{number}.dcm", pixels, number)
    x, rows = converted(tmp_path / "scans", tmp_path)
    assert [row["series"] for row in rows] == [str(series) for series in range(10) for _ in range(4)]
    data = DataConfig(source=str(tmp_path / "out.npy"), image_size=8, channels=1, val_fraction=0.2)
    data.label_column = None
    train, val = splits.split(sources.open_source(data), data)
    held_out = set(x[val.indices, 0, 0].tolist())
    assert len(val) == 8 and len(held_out) == 2 and not held_out & set(x[train.indices, 0, 0].tolist())


def test_a_table_that_cannot_be_written_leaves_no_array_without_one(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["x"] = RNG.random((3, 8, 8))
    (tmp_path / ".tmp-out.csv").mkdir()  # where the table would be written first
    command = (convert.main, tmp_path / "scan.h5", "--out", tmp_path / "out.npy")
    with pytest.raises(InputError, match="out.csv: not saved"):
        call(*command)
    assert not (tmp_path / "out.npy").exists()
    (tmp_path / ".tmp-out.csv").rmdir()
    call(*command)
    assert np.load(tmp_path / "out.npy").shape == (3, 8, 8)


def test_what_no_volume_or_folder_can_hold_is_one_line(tmp_path):
    np.save(tmp_path / "long.npy", np.zeros((2**15, 1, 2), np.uint8))
    with pytest.raises(InputError, match="long.npy: 32,768 along an axis; NIfTI holds 32,767"):
        call(convert.main, tmp_path / "long.npy", "--out", tmp_path / "long.nii")
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(InputError, match="not saved"):
        call(convert.main, tmp_path / "x.npy", "--out", tmp_path / "x.npy" / "y.nii")


def test_dicom_of_several_times_at_a_place_is_in_their_order(tmp_path):
    for number in (1, 2, 10, 11):
        pixels = np.full((8, 9), number, np.int16)
        write_dicom(tmp_path / f"IM{number}.dcm", pixels, number, position=5.0 + 1e-7 * (number % 3))
    assert converted(tmp_path, tmp_path)[0][:, 0, 0].tolist() == [1, 2, 10, 11]


def test_labels_in_hdf5_are_columns_no_coordinates_and_of_this_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = RNG.random((6, 6, 6)), np.linspace(0, 1, 6)
    assert "label" not in converted(tmp_path / "a.h5", tmp_path)[1][0]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"], file["label"] = RNG.random((6, 8, 9)), np.arange(6)[:, None]
    assert [row["label"] for row in converted(tmp_path / "b.h5", tmp_path)[1]] == list("012345")
    (tmp_path / "secret").write_bytes(b"secret")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["x"] = RNG.random((6, 8, 9))
        file.create_dataset("label", (6,), "u1", external=[(str(tmp_path / "secret"), 0, 6)])
    with pytest.raises(InputError, match="label lies in another file"):
        converted(tmp_path / "c.h5", tmp_path)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"] = RNG.integers(0, 9, (6, 8, 9))
        file["x"].attrs["scale_factor"] = 0.1
    with pytest.raises(InputError, match="x is to be changed by its scale_factor first"):
        converted(tmp_path / "d.h5", tmp_path)


def test_a_zarr_zip_opens(tmp_path):
    x = RNG.random((5, 8, 9)).astype(np.float32)
    with zarr.storage.ZipStore(tmp_path / "run::1.zarr.zip", mode="w") as store:
        zarr.open_group(store, mode="w").create_array("x", data=x)
    assert np.array_equal(converted(tmp_path / "run::1.zarr.zip", tmp_path)[0], x)


def test_a_volume_that_comes_back_lies_as_its_pattern_and_never_over_it(tmp_path):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(RNG.random((4, 5, 6)).astype(np.float32), affine)
    image.set_sform(affine, 4)
    image.to_filename(tmp_path / "brain.nii")
    x, _ = converted(tmp_path / "brain.nii", tmp_path)
    words = (tmp_path / "out.npy", "--like", tmp_path / "brain.nii", "--out")
    call(convert.main, *words, tmp_path / "again.nii")
    again = nibabel.load(tmp_path / "again.nii")
    assert int(again.header["sform_code"]) == 4 and again.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(again.get_fdata(), image.get_fdata()) and len(x) == 6
    with pytest.raises(InputError, match="is the volume of --like"):
        call(convert.main, *words, tmp_path / "brain.nii")


def test_a_name_that_is_not_utf_8_is_escaped_in_the_table(tmp_path):
    folder = tmp_path / "scan"
    folder.mkdir()
    path = folder / os.fsdecode(b"caf\xe9.tif")
    try:
        path.write_bytes(b"")
    except OSError:
        pytest.skip("this disk takes UTF-8 alone")
    tifffile.imwrite(path, np.zeros((8, 9), np.uint8))
    assert converted(folder, tmp_path)[1][0]["file"] == "caf\\udce9.tif"
