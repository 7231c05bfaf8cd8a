"""The cache: its statistics are those of what it samples, it goes on where it stopped, a stale one is refused
by name."""

import json
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared import disk
from shared.config import InputError
from shared.data import latents, shard
from shared.sampling.transforms import LatentCodec
from stage1_vae import encode
from tests.conftest import ROOT, call


def write(folder, name, number, rows, labels=None):
    torch.manual_seed(number)
    moments = torch.cat([2 + 3 * torch.randn(rows, 2, 4, 4), -1 + torch.randn(rows, 2, 4, 4)], 1)
    shard.write(latents.shard_path(folder, name, number), moments, labels)
    return moments


@pytest.mark.parametrize("per_element", [False, True])
def test_statistics_are_those_of_the_samples(tmp_path, per_element):
    moments = torch.cat([write(tmp_path, "train", n, 700) for n in range(2)])
    summaries = [shard.summarise(path) for path in sorted((tmp_path / "train").iterdir())]
    mean, std = shard.statistics(summaries, per_element)
    assert mean.shape == ((2, 4, 4) if per_element else (2, 1, 1))
    raw = LatentCodec([[[0.0]]] * 2, [[[1.0]]] * 2).sample(
        moments.repeat(20, 1, 1, 1), torch.randn(28000, 2, 4, 4)
    )
    axes = (0,) if per_element else (0, 2, 3)
    torch.testing.assert_close(mean.float(), raw.mean(axes, keepdim=True)[0], atol=0.06, rtol=0.02)
    torch.testing.assert_close(std.float(), raw.std(axes, keepdim=True)[0], atol=0.06, rtol=0.02)
    z = LatentCodec(mean.tolist(), std.tolist()).sample(moments, torch.randn(1400, 2, 4, 4))
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_rows_come_from_their_shards(tmp_path):
    parts = [write(tmp_path, "train", n, rows, torch.arange(rows)) for n, rows in enumerate((5, 3, 4))]
    part = latents.Latents(sorted((tmp_path / "train").iterdir()))
    assert len(part) == 12 and part.shape == (2, 4, 4)
    batch = part.__getitems__([11, 0, 5, 7, 4])
    assert torch.equal(batch["moments"], torch.cat(parts)[[11, 0, 5, 7, 4]].half().float())
    assert batch["label"].tolist() == [3, 0, 0, 2, 4]
    sent = ForkingPickler.dumps(part)  # as to a loader process that does not inherit what is mapped
    there = ForkingPickler.loads(sent)
    assert len(sent) < 1000 and torch.equal(there.__getitems__([11])["moments"], batch["moments"][:1])


def test_moments_are_kept_in_half_precision_where_rounding_is_lost_in_the_posterior_s_noise(tmp_path):
    """A cache may hold shards of both kinds."""
    moments = write(tmp_path, "train", 0, 5)
    mean, logvar = moments.chunk(2, dim=1)
    others = {"too large": moments * 1e5, "narrow posteriors": torch.cat([mean, logvar - 14], 1)}
    for number, other in enumerate(others.values(), 1):
        shard.write(latents.shard_path(tmp_path, "train", number), other, None)
    shards = sorted((tmp_path / "train").iterdir())
    kinds = [shard.mapped(path, "moments").dtype for path in shards]
    assert kinds == [torch.float16, torch.float32, torch.float32]
    found = latents.Latents(shards).__getitems__(range(15))["moments"]
    assert found.dtype == torch.float32 and torch.equal(found[5:], torch.cat(list(others.values())))
    rounding = (found[:5, :2] - mean) / (0.5 * logvar).exp()
    assert rounding.square().mean() < shard.ROUNDING


def test_the_cache_of_a_run(trained):
    cache = latents.open_cache(trained / "latents")
    train, val = cache.split("train"), cache.split("val")
    assert len(train) == 58 and len(val) == 6 and cache.classes == [str(i) for i in range(10)]
    z = LatentCodec(**cache.manifest["codec"]).sample(
        train.__getitems__(range(58))["moments"], torch.randn(58, 4, 4, 4)
    )
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


def test_an_interrupted_cache_goes_on_to_the_same_bytes(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("latents"))
    monkeypatch.setattr(latents, "SHARD", 16)
    call(encode.main, "--run", run)
    whole = {p.name: p.read_bytes() for p in (run / "latents" / "train").iterdir()}
    assert len(whole) == 4
    # as if killed: no manifest, one shard cut short, one missing
    (run / "latents" / "manifest.json").unlink()
    (run / "latents" / "train" / "00002.safetensors").write_bytes(whole["00002.safetensors"][:100])
    (run / "latents" / "train" / "00003.safetensors").unlink()
    call(encode.main, "--run", run)
    assert {p.name: p.read_bytes() for p in (run / "latents" / "train").iterdir()} == whole


def test_a_cache_that_is_up_to_date_is_left(trained, tmp_path):
    before = (trained / "latents" / "manifest.json").stat().st_mtime_ns
    call(encode.main, "--run", trained)  # up to date
    assert (trained / "latents" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("made by", lambda f: f["made by"].update({"vae/diffusion_pytorch_model.safetensors": "0" * 32})),
        ("made by", lambda f: f["made by"].update({"value_transform/config.json": "0" * 32})),
        ("data.train.content", lambda f: f["data"]["train"].update(content="0" * 32)),
        ("data.train.image_size", lambda f: f["data"]["train"].update(image_size=64)),
    ],
)
def test_a_stale_cache_is_refused_by_name(trained, tmp_path, key, change, finished):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    tree = latents.read_fingerprint(run / "latents")
    change(tree)
    (run / "latents" / "fingerprint.json").write_text(json.dumps(tree))
    if not finished:
        (run / "latents" / "manifest.json").unlink()
    with pytest.raises(InputError, match="stale") as caught:
        call(encode.main, "--run", run)
    assert key in str(caught.value) and "remove the folder" in str(caught.value)


def test_latents_that_do_not_say_what_they_are_of_are_refused(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "latents" / "fingerprint.json").unlink()
    with pytest.raises(InputError, match="does not say"):
        call(encode.main, "--run", run)


def test_a_shard_is_read_again_only_where_it_was_touched(trained, tmp_path, monkeypatch):
    """Opening for training reads each shard once, opening for samples reads none."""
    folder = tmp_path / "latents"
    shutil.copytree(trained / "latents", folder)
    read = []
    sha256 = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda path: read.append(path.parent.name) or sha256(path))
    latents.open_cache(folder)
    assert set(read) == {"vae", "value_transform"}
    for wanted in ({"train", "val"}, set()):  # a copy is another file; it is remembered
        read.clear()
        latents.verify(folder)
        assert set(read) & {"train", "val"} == wanted
    path = folder / "val" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="val/00000.safetensors was changed"):
        latents.verify(folder)
    folder.joinpath(".verified").write_text("[]")  # nothing is believed of a note that is none
    read.clear()
    with pytest.raises(InputError, match="val/00000.safetensors was changed"):
        latents.verify(folder)
    assert set(read) & {"train", "val"} == {"train", "val"}


def test_many_shards_do_not_need_many_open_files(tmp_path):
    """520 shards with labels, where 256 files may be open."""
    for number in range(520):
        write(tmp_path, "train", number, 2, torch.arange(2))
    code = (
        "import resource, sys; from pathlib import Path; from shared.data.latents import Latents\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "part = Latents(sorted(Path(sys.argv[1]).iterdir()))\n"
        "print(part.__getitems__(range(0, 1040, 2))['moments'].shape[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "train"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "520\n", done.stderr


def test_no_cache_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="stage1_vae/encode.py"):
        latents.open_cache(tmp_path)


def test_shards_are_mapped_not_read(trained):
    path = trained / "latents" / "train" / "00000.safetensors"
    moments = shard.mapped(path, "moments")
    assert torch.equal(moments, load_file(path)["moments"])
    if Path("/proc/self/maps").is_file():
        assert str(path) in Path("/proc/self/maps").read_text()


def test_a_cache_of_a_later_format_is_refused(trained, tmp_path):
    shutil.copytree(trained / "latents", tmp_path / "latents")
    path = tmp_path / "latents" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(InputError, match="manifest.json: format 2 is of a later version"):
        latents.open_cache(tmp_path / "latents")


def test_a_cache_is_not_sealed_before_all_its_shards_are_there(tmp_path, monkeypatch):
    """On a shared disk the first process may not see yet what another machine has written."""
    monkeypatch.setattr(latents, "PATIENCE", 0)
    monkeypatch.setattr(latents, "SHARD", 4)
    plan = latents.planned(tmp_path, {"train": 10, "val": 3})
    assert [len(rows) for _, rows in plan["train"]] == [4, 4, 2]
    for path, rows in plan["train"][:2]:
        shard.write(path, torch.zeros(len(rows), 2, 1, 1), None)
    with pytest.raises(InputError, match="00002.safetensors: not there, or not of 2 images"):
        latents.finish(tmp_path, tmp_path, False, [], plan, {})
    assert not (tmp_path / latents.MANIFEST).exists()
