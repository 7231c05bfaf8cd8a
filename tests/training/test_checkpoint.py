"""A checkpoint is whole or not there; a broken one is named and passed over; the last good one always
stays."""

import json
import shutil

import pytest
import torch

from shared import disk
from shared.config import InputError
from shared.data import shard
from shared.run import newest_model, open_run
from shared.sampling.transforms import LatentCodec
from shared.training import checkpoint


def write(parent, step, keep=5):
    tensors = {"w": torch.full((4, 4), float(step)), "b": torch.arange(3)}
    return checkpoint.save(parent, step, {"codec": LatentCodec([[[float(step)]]], [[[1.0]]])}, tensors, keep)


def test_what_is_saved_loads(tmp_path):
    folder = write(tmp_path, 7)
    assert (
        checkpoint.newest(tmp_path) == folder
        and folder.name == "step_00000007"
        and checkpoint.step_of(folder) == 7
    )
    tensors = disk.read_tensors(folder / "training.safetensors")
    assert torch.equal(tensors["w"], torch.full((4, 4), 7.0)) and tensors["b"].dtype == torch.int64
    assert LatentCodec.from_pretrained(folder / "codec").mean == 7
    assert not list(tmp_path.glob(".tmp-*"))


def test_equal_training_gives_equal_bytes(tmp_path):
    a, b = write(tmp_path / "a", 3), write(tmp_path / "b", 3)
    assert (a / disk.MANIFEST).read_bytes() == (b / disk.MANIFEST).read_bytes()


def test_only_broken_ones_are_an_error(tmp_path):
    (write(tmp_path, 1) / "training.json").unlink()
    with pytest.raises(InputError, match="every checkpoint is broken"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "nothing yet") is None


def test_a_copy_by_another_name_is_not_the_newest(trained, tmp_path):
    """For the report, a publication and the doctor as for a training."""
    shutil.copytree(trained, tmp_path / "run")
    run, recipe = open_run(tmp_path / "run")
    newest = newest_model(run, recipe)
    shutil.copytree(newest, newest.with_name(f"{newest.name}_copy"))
    assert newest_model(run, recipe) == newest == checkpoint.newest(newest.parent)


def test_rotation_keeps_the_newest_and_touches_nothing_else(tmp_path):
    (tmp_path / "step_mine").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    for step in range(1, 6):
        write(tmp_path, step, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes",
        "step_00000004",
        "step_00000005",
        "step_mine",
    ]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    good = write(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match="no room"):
        write(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == good and not list(tmp_path.glob(".tmp-*"))


def test_an_interrupted_save_leaves_the_older_one(tmp_path, monkeypatch):
    good = write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            disk, "fsync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(InputError, match="No space left on device"):
            write(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == good and not list(tmp_path.glob(".tmp-*"))
    (tmp_path / ".tmp-step_00000009").mkdir()  # left by a process that was killed
    write(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_file_that_is_no_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04garbage" * 9)
    with pytest.raises(InputError, match="x.safetensors"):
        disk.read_tensors(tmp_path / "x.safetensors")


def test_permissions_follow_the_umask(tmp_path):
    import os

    os.umask(umask := os.umask(0))
    shard.write(tmp_path / "shard.safetensors", torch.zeros(1, 2, 1, 1), None)
    for file in (write(tmp_path, 1) / "training.safetensors", tmp_path / "shard.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("read", [checkpoint.newest, checkpoint.recover])
def test_a_later_format_is_refused_and_left_alone(tmp_path, read):
    """It is not broken: going back to an older checkpoint would throw away what a later version trained."""
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    manifest = json.loads((folder / disk.MANIFEST).read_text())
    (folder / disk.MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(InputError, match="format 2 is of a later version"):
        read(tmp_path)
    assert folder.is_dir()
