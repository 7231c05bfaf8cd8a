"""The user's cache folder: what is there is right, or it is made anew."""

import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from shared import cache, disk
from shared.cache import CachedRows
from shared.data.config import DataConfig
from shared.data.images import _origin, decode
from shared.data.sources import open_source
from shared.disk import TEMPORARY
from tests.conftest import ROOT, clean_environment


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latent-stack"


# ---------------------------------------------------------------- arrays


def test_what_a_killed_process_left_goes_and_what_another_one_writes_stays():
    made = cache.cached("key", lambda path: path.write_bytes(b"whole"))
    made.unlink()
    left, young = (made.with_name(f"{TEMPORARY}{name}-{made.name}") for name in ("left", "young"))
    for file in (left, young):
        file.write_bytes(b"a part")
    os.utime(left, (0, 0))
    assert cache.cached("key", lambda path: path.write_bytes(b"again")).read_bytes() == b"again"
    assert young.exists() and not left.exists()


def test_one_process_makes_a_cached_array_and_the_others_wait(tmp_path):
    """Four at once: one writes, none leaves something temporary."""
    code = (
        "import sys, time; from pathlib import Path; from shared.cache import cached\n"
        "def write(path):\n"
        "    open(sys.argv[1], 'a').write('x'); time.sleep(1); path.write_bytes(b'whole')\n"
        "assert cached('key', write).read_bytes() == b'whole'"
    )
    environment = clean_environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    arguments = [sys.executable, "-c", code, str(tmp_path / "written")]
    started = [subprocess.Popen(arguments, cwd=ROOT, env=environment) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert (tmp_path / "written").read_text() == "x"
    assert [path.suffix for path in (tmp_path / "cache" / "latent-stack").iterdir()] == [".npy"]


# ---------------------------------------------------------------- rows


def test_a_row_is_what_was_kept_of_this_origin():
    rows = CachedRows("key", 3, 4)
    assert rows.take(1, "a photo") is None
    rows.keep(1, "a photo", b"abcd")
    assert rows.take(1, "a photo") == CachedRows("key", 3, 4).take(1, "a photo") == b"abcd"
    for row, origin in ((0, "a photo"), (2, "a photo"), (1, "a photo that changed")):
        assert rows.take(row, origin) is None
    rows.keep(2, "another", b"efgh")
    assert (rows.take(1, "a photo"), rows.take(2, "another")) == (b"abcd", b"efgh")
    for other in (CachedRows("other", 3, 4), CachedRows("key", 3, 3)):
        assert other.take(1, "a photo") is None


@pytest.mark.parametrize("byte", range(8))
def test_a_damaged_row_is_none(place, byte):
    rows = CachedRows("key", 1, 4)
    rows.keep(0, "a photo", b"abcd")
    [file] = place.iterdir()
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)
    assert rows.take(0, "a photo") is None
    file.write_bytes(content[:byte])
    assert rows.take(0, "a photo") is None


def test_a_full_disk_keeps_nothing_and_stops_nothing(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free", lambda _: 10 * (4 + 4))
        rows = CachedRows("key", 1, 4)
        rows.keep(0, "a photo", b"abcd")
    assert rows.take(0, "a photo") is None and not list(place.iterdir())
    place.rmdir()
    place.write_text("a file, where the folder would be")
    rows = CachedRows("key", 1, 4)
    rows.keep(0, "a photo", b"abcd")
    assert rows.take(0, "a photo") is None


def test_rows_that_nobody_uses_go(place):
    old, used = CachedRows("old", 1, 4), CachedRows("used", 1, 4)
    for rows in (old, used):
        rows.keep(0, "a photo", b"abcd")
    [file] = [path for path in place.iterdir() if path == old._path]
    os.utime(file, (0, 0))
    os.utime(used._path, (time.time(), 0))  # read today
    CachedRows("new", 1, 4).keep(0, "a photo", b"abcd")
    assert old.take(0, "a photo") is None and used.take(0, "a photo") == b"abcd"


# ---------------------------------------------------------------- photos


@pytest.fixture
def photos(tmp_path):
    """Two photos and a scan of 16 bits of files larger than what is learned from, and a smaller photo."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    for number, image in enumerate(noise[:2]):
        Image.fromarray(image).save(folder / f"{number}.jpg", quality=95)
    Image.fromarray(noise[2, :, :, 0].astype(np.uint16) * 257).save(folder / "2.tif")
    Image.fromarray(noise[2]).resize((8, 8)).save(folder / "3.jpg")
    return DataConfig(source=str(folder), image_size=32, channels=3)


def test_a_large_file_is_decoded_once_to_the_same_bits(photos):
    files = sorted(str(path) for path in Path(photos.source).iterdir())
    first, again = (open_source(photos).read([0, 1, 2, 3]) for _ in range(2))
    for file, one, other in zip(files, first, again, strict=True):
        for image in (one, other):
            assert image.dtype == (np.float32 if file.endswith("tif") else np.uint8)
            np.testing.assert_array_equal(image, decode(file, photos))
    for index, (kind, kept) in enumerate(
        [("uint8", True), ("uint8", True), ("float32", True), ("uint8", False)]
    ):
        planted = np.full((3, 32, 32), index, kind)
        rows = open_source(photos).decode.kept[kind]
        origin, _ = _origin(files[index])
        assert (rows.take(index, origin) is not None) == kept
        rows.keep(index, origin, planted.tobytes())
        [seen] = open_source(photos).read([index])
        assert np.array_equal(seen, planted) == kept  # one that was kept is not decoded again


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_photo_that_is_replaced_is_seen(photos, keep_time):
    open_source(photos).read([0])
    path = Path(photos.source) / "0.jpg"
    was = path.stat()
    content = io.BytesIO()
    Image.new("RGB", (99, 99), "red").save(content, "JPEG", quality=95)
    path.write_bytes(content.getvalue().ljust(was.st_size, b"\0"))
    assert path.stat().st_size == was.st_size
    if keep_time:
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    [image] = open_source(photos).read([0])
    assert image[0].min() > 250 and image[1:].max() < 5


def test_rows_of_a_table_of_encoded_files_are_told_by_their_bytes(photos, tmp_path):
    for name in ("0.jpg", "1.jpg"):
        photo = {"bytes": (Path(photos.source) / name).read_bytes(), "path": None}
        table = datasets.Dataset.from_dict({"image": [photo, photo]})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "set.parquet")
        config = replace(photos, source=str(tmp_path / "set.parquet"))
        for _ in range(2):
            np.testing.assert_array_equal(open_source(config).read([1])[0], decode(photo["bytes"], photos))
