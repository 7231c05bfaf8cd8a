"""What a training will take, said before it is begun; and one of everything, which leaves nothing."""

import json
import re
import time

import pytest
from accelerate import Accelerator

import stage1_vae.train
import stage2_diffusion.train
from shared import recipe
from shared.config import InputError
from shared.data import splits
from shared.data.config import DataConfig
from shared.data.sources import open_source
from shared.measure import estimate
from shared.training import checkpoint, state
from tests.conftest import call, write_images


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.0)


def test_an_estimate_says_parameters_disk_and_time(tiny, tmp_path, capsys, quick):
    config = tiny(stage1__loss_weights={"l1": 1.0, "kl": 0.02, "adversarial": 0.05})
    call(recipe.main, config, "--estimate", "stage1.max_steps=1000", "stage1.discriminator.start_step=500")
    said = capsys.readouterr().out
    assert re.search(
        r"stage 1: \S+ M parameters, 1,000 steps of 8 \(138 epochs\); checkpoints: \S+ [KM]iB", said
    )
    assert re.search(r"latents: 64 of 4x4x4, 16 KiB on disk; about \S+ (s|min)", said)
    assert re.search(r"stage 2: .* about \S+ (s|min); peak memory host \S+ [MG]iB", said)
    assert re.search(r"in all about \S+ (s|min) of this machine; .* free where .*run will be", said)
    assert not (tmp_path / "run").exists()


def test_what_a_large_file_takes_is_counted_once(tmp_path):
    write_images(tmp_path / "photos", 9, (900, 1200))
    data = DataConfig(source=str(tmp_path / "photos"), image_size=16, channels=3)
    pixels, _ = splits.split(open_source(data), data)
    few, decode = estimate.familiar(pixels, Accelerator())
    started = time.perf_counter()
    again = few.__getitems__(range(len(few)))["raw"]
    assert decode > 5 * (time.perf_counter() - started) / len(few)
    assert len(few) == len(pixels) and len(again.flatten(1).unique(dim=0)) == len(pixels)
    _, known = estimate.familiar(pixels, Accelerator())  # which were decoded a moment ago
    assert known < decode / 5
    data = DataConfig(source="digits", channels=1)
    digits, _ = splits.split(open_source(data), data)
    assert estimate.familiar(digits, Accelerator()) == (digits, 0.0)


def test_an_estimate_on_latents_from_elsewhere_is_of_stage_2_alone(tiny, trained, capsys, quick):
    config = tiny(
        data={"source": "nowhere/at/all", "image_size": 16}, stage2__latents=str(trained / "latents")
    )
    call(recipe.main, config, "--estimate")
    said = capsys.readouterr().out
    assert "stage 2: " in said and "in all about" in said
    assert "stage 1: " not in said and "latents: " not in said


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_takes_what_was_said(tiny, tmp_path, monkeypatch, optimizer):
    told = []
    save = state.save
    monkeypatch.setattr(
        "shared.training.engine.save",
        lambda stage, *rest: told.append(state.checkpoint_bytes(stage)) or save(stage, *rest),
    )
    channels = {"stage1__optim__name": optimizer, "stage1__model__channels": [16, 32]}
    call(stage1_vae.train.main, "--config", tiny(**channels))
    folder = checkpoint.newest(tmp_path / "run" / "stage1_vae" / "checkpoints")
    tensors = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert sum(tensors) == pytest.approx(told[-1], rel=0.1)


def test_a_training_that_will_not_fit_on_the_disk_says_so_first(tiny, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100_000))
    with pytest.raises(InputError, match="this training needs .* MiB for its checkpoints, 0 are free"):
        call(stage1_vae.train.main, "--config", tiny())
    assert not (tmp_path / "run" / "stage1_vae" / "metrics.jsonl").exists()


def test_a_dry_run_does_one_of_everything_and_leaves_nothing(tiny, trained, tmp_path, capsys):
    config = tiny(stage2__latents=str(trained / "latents"))
    for main in (stage1_vae.train.main, stage2_diffusion.train.main):
        call(main, "--dry-run", "--config", config)
        said = capsys.readouterr().out
        for words in ("one step of 8 images: ", "one validation: val/", "one save: ", "samples: 4x1x16x16"):
            assert words in said
        assert "dry run: all of it works; peak memory host" in said and "collapse" not in said
    assert not (tmp_path / "run").exists()


def test_the_log_tells_the_pace(tiny, tmp_path):
    call(stage1_vae.train.main, "--config", tiny())
    path = tmp_path / "run" / "stage1_vae" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if "speed/" in line]
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        assert line["speed/images_per_second"] > 0 and 0 <= line["speed/waiting_for_data"] < 1
        assert 50 < line["memory/host"] < 50_000 and line["time"] > 1.7e9
