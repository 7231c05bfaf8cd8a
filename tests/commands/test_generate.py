"""Samples: their own seed each, from a run or a pipeline folder, here or where this package is not
installed."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file

from shared import disk, generate
from shared import trained as trained_run
from shared.config import InputError
from shared.run import open_run
from shared.sampling import tasks
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler
from shared.sampling.transforms import ValueTransform
from shared.show import grids
from shared.show.samples import write_samples
from tests.conftest import TORCHRUN, call, clean_environment, command, train_all


def draw(run, out, *flags):
    call(generate.main, "--run", run, "--out", out, *flags)
    return np.load(out / "samples.npz")


def test_the_grid_has_full_rows_only(trained, tmp_path):
    """A column is a class: of 24 samples of ten classes the grid shows two rows, the files are all there."""
    draw(trained, tmp_path, "--num-images", "24", "--num-steps", "1")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (10 * 66 + 2, 2 * 66 + 2)
    assert len(list(tmp_path.glob("000*.png"))) == 24


def test_files(trained, tmp_path):
    samples = draw(trained, tmp_path / "a")
    assert samples["x"].shape == (6, 1, 16, 16) and samples["x"].dtype == np.uint8
    assert samples["label"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        *(f"{i:05d}.png" for i in range(6)),
        "grid.png",
        "samples.npz",
    ]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a/00002.png")), samples["x"][2, 0])
    draw(trained, tmp_path / "a", "--num-images", "2")
    assert len(list((tmp_path / "a").glob("0*.png"))) == 2


def test_a_row_of_samples_is_whole_or_not_there(trained, tmp_path):
    """One that ends before its time leaves the older one; what a killed process left goes with the next."""
    draw(trained, tmp_path)
    older = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken_off():
        yield 0, torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 16, 16)
        assert (tmp_path / ".tmp-samples/00001.png").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, broken_off(), 4, None, [], 0, 0, PartialState())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == older
    (tmp_path / ".tmp-samples").mkdir()
    (tmp_path / ".tmp-samples/00009.png").write_text("left")
    draw(trained, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(older)


def test_samples_are_not_kept(tmp_path):
    """However many are drawn: of earlier batches nothing is left but what the grid shows."""
    seen = []

    def batches():
        for first in range(0, 2000, 100):
            values, pixels = torch.full((100, 1, 2, 2), first / 100), torch.zeros(100, 1, 2, 2)
            assert not any(old() is not None for pair in seen[:-1] for old in pair)
            seen.append((weakref.ref(values), weakref.ref(pixels)))
            yield first, values, pixels

    write_samples(tmp_path, batches(), 2000, None, [], 0, 0, PartialState())
    x = np.load(tmp_path / "samples.npz")["x"]
    assert len(seen) == 20 and np.array_equal(x[:, 0, 0, 0], np.repeat(np.arange(20), 100))
    assert (tmp_path / "01999.png").is_file()


def test_batch_size_does_not_matter(trained, tmp_path):
    pipe = trained_run.open_pipeline(trained)
    noise = torch.stack([pipe.noise(5, i, pipe.latent_shape) for i in range(6)])
    whole = pipe.sample(noise, torch.arange(6), 2.0, 4)
    parts = torch.cat([pipe.sample(noise[i : i + 1], torch.arange(6)[i : i + 1], 2.0, 4) for i in range(6)])
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)
    a = draw(trained, tmp_path / "a", "--batch-size", "6", "--guidance-scale", "2")["x"].astype(int)
    b = draw(trained, tmp_path / "b", "--batch-size", "1", "--guidance-scale", "2")["x"].astype(int)
    assert abs(a - b).max() <= 1


def test_processes_do_not_matter_to_the_bit(trained, tmp_path):
    flags = ("--run", trained, "--batch-size", "2", "--num-images", "5", "--out")
    command("-m", "shared.generate", *flags, tmp_path / "one")
    command("-m", "shared.generate", *flags, tmp_path / "two", launcher=(*TORCHRUN,))
    assert (tmp_path / "one/samples.npz").read_bytes() == (tmp_path / "two/samples.npz").read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", "-1"), "--seed: must be between 0"),
        (("--seed", str(2**63)), "--seed: must be between 0"),
        (("--num-steps", "1001"), "--num-steps: must be between 1 and 1000"),
        (("--guidance-scale", "inf"), "--guidance-scale: must be a finite number"),
        (("--num-images", "0"), "--num-images: must be at least 1"),
    ],
)
def test_a_flag_outside_its_range_is_one_line(trained, tmp_path, flags, said):
    with pytest.raises(InputError, match=said):
        draw(trained, tmp_path, *flags)


def test_pictures_of_somebody_else_stay(trained, tmp_path):
    (tmp_path / "00000.png").write_text("mine")
    with pytest.raises(InputError, match="holds a 00000.png of another kind"):
        draw(trained, tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("00000.png", "mine")]


@pytest.mark.parametrize("name", ["00001.png", "100000.png", "grid.png", "samples.npz"])
def test_no_picture_of_somebody_else_is_replaced_or_removed(trained, tmp_path, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds a {name} of another kind"):
        draw(trained, mine)
    assert [file.read_text() for file in mine.iterdir()] == ["mine"]


def test_samples_that_are_replaced_are_said_and_pictures_beside_them_stay(trained, tmp_path, capsys):
    draw(trained, tmp_path, "--num-images", "5")
    assert "are replaced" not in capsys.readouterr().out
    draw(trained, tmp_path, "--num-images", "3")
    assert "holds 5 samples, which are replaced" in capsys.readouterr().out
    call(generate.main, "--run", trained, "--out", tmp_path, "--interpolate", "0", "1", "--num-images", "2")
    assert "are replaced" not in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.glob("0*.png")) == ["00000.png", "00001.png", "00002.png"]
    (tmp_path / "00003.png").write_text("mine")
    with pytest.raises(InputError, match="holds a 00003.png of another kind"):
        draw(trained, tmp_path)
    assert (tmp_path / "00003.png").read_text() == "mine"
    np.savez(tmp_path / "samples.npz", x=np.zeros((9, 3, 4, 4)), label=np.zeros(9))  # a set of one's own
    with pytest.raises(InputError, match="holds a samples.npz of another kind"):
        draw(trained, tmp_path)


def test_seed_label_and_steps_matter(trained, tmp_path):
    base = draw(trained, tmp_path / "a")["x"]
    for flags in (["--seed", "1"], ["--label", "7"], ["--num-steps", "9"], ["--guidance-scale", "5"]):
        assert not np.array_equal(draw(trained, tmp_path / "b", *flags)["x"], base), flags
    np.testing.assert_array_equal(draw(trained, tmp_path / "b")["x"], base)


def test_without_a_run_the_newest_is_taken(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no run found under runs/"):
        open_run(None)
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        recipe = Path(shutil.copy(trained / "recipe.yaml", tmp_path / "runs" / name))
        os.utime(recipe, (10**9 + age, 10**9 + age))
    assert open_run(None)[0].path == Path("runs/a")
    assert "taking the newest, runs/a" in capsys.readouterr().out


def test_of_a_hub_s_folder_only_numbers_and_words_are_fetched(trained, monkeypatch):
    asked = {}

    def fetched(name, **how):
        asked.update(how, name=name)
        return str(trained / "pipeline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    pipe = LatentDiffusionPipeline.from_pretrained("me/mine", revision="v1")
    assert asked == {"name": "me/mine", "allow_patterns": ["*.json", "*.safetensors"], "revision": "v1"}
    assert pipe(1, seed=0, num_inference_steps=1).images


def test_the_pipeline_folder_gives_the_same(trained, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(trained / "pipeline", folder)
    flags = ("--num-images", "6", "--num-steps", "3")
    np.testing.assert_array_equal(
        draw(folder, tmp_path / "a", *flags)["x"], draw(trained, tmp_path / "b", *flags)["x"]
    )


def test_an_unfinished_run_samples_from_its_newest_checkpoint(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("pipeline"))
    np.testing.assert_array_equal(draw(run, tmp_path / "a")["x"], draw(trained, tmp_path / "b")["x"])
    shutil.rmtree(run / "stage2_diffusion")
    shutil.copytree(
        trained / "pipeline", run / "pipeline"
    )  # its checkpoints removed, a finished run has this
    np.testing.assert_array_equal(draw(run, tmp_path / "a")["x"], draw(trained, tmp_path / "b")["x"])
    shutil.rmtree(run / "pipeline")
    with pytest.raises(InputError, match="nothing to sample from yet"):
        trained_run.open_pipeline(run)


def test_a_finished_run_draws_without_its_latents(trained, tmp_path):
    """Of the export, as long as that is the newest network's."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "latents")
    np.testing.assert_array_equal(draw(run, tmp_path / "a")["x"], draw(trained, tmp_path / "b")["x"])
    unet = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = disk.read_tensors(unet)
    save_file({name: weight + 1 for name, weight in weights.items()}, unet)
    (run / "pipeline" / disk.MANIFEST).unlink()
    disk.seal(run / "pipeline")
    with pytest.raises(InputError, match="no saved latents here"):
        draw(run, tmp_path / "c")


def test_interpolation(trained, tmp_path):
    call(
        generate.main,
        "--run",
        trained,
        "--out",
        tmp_path,
        "--interpolate",
        "3",
        "8",
        "--label",
        "3",
        "--num-images",
        "5",
    )
    with Image.open(tmp_path / "interpolate_3_8.gif") as gif:
        assert gif.n_frames >= 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--label", "eleven"], "no class 'eleven'"),
        (["--label", "10"], "no class '10'"),
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--run", "/nowhere"], "not a run folder"),
    ],
)
def test_wrong_flags(trained, tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        call(generate.main, "--run", trained, "--out", tmp_path, *flags)


ELSEWHERE = """
import sys, numpy as np, torch
# not importable here:
sys.modules.update({name: None for name in ("shared", "stage1_vae", "stage2_diffusion")})
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
np.save(sys.argv[2], pipe(labels=torch.arange(6), batch_size=6, num_inference_steps=3).values)
"""
HERE = """
import sys, numpy as np, torch
from shared.sampling.pipeline import LatentDiffusionPipeline
pipe = LatentDiffusionPipeline.from_pretrained(sys.argv[1])
out = pipe(labels=torch.arange(6), batch_size=6, num_inference_steps=3)
assert out.images[0].size == (16, 16)
np.save(sys.argv[2], out.values)
"""


@pytest.mark.parametrize("script", [ELSEWHERE, HERE], ids=["trust_remote_code", "own class"])
def test_the_pipeline_loads_in_a_fresh_process_in_another_folder(trained, tmp_path, script):
    folder = tmp_path / "elsewhere"
    shutil.copytree(trained / "pipeline", folder)
    environment = clean_environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "x.npy"], check=True, cwd=tmp_path, env=environment
    )
    expected = draw(trained, tmp_path / "a", "--num-images", "6", "--num-steps", "3")["x"]
    assert abs(np.load(tmp_path / "x.npy").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("how", ["loaded", "moved"])
def test_an_export_draws_in_half_precision(trained, how):
    """The networks in bfloat16; guidance and the latents between steps stay in float32."""
    full = LatentDiffusionPipeline.from_pretrained(trained / "pipeline")
    half = LatentDiffusionPipeline.from_pretrained(
        trained / "pipeline", **({"torch_dtype": torch.bfloat16} if how == "loaded" else {})
    )
    half.to(torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    options = {"labels": torch.arange(6), "batch_size": 6, "num_inference_steps": 3, "guidance_scale": 2.0}
    exact, rounded = full(**options), half(**options)
    assert rounded.latents.dtype == torch.float32 and rounded.values.dtype == exact.values.dtype
    assert (rounded.latents - exact.latents).abs().max() < 0.1 * exact.latents.abs().max()


def test_another_sampler_interval_precision_and_checkpoint(tiny, tmp_path):
    """The flags draw what a recipe that says so would draw."""
    config = tiny(stage2__guide_at=0.5, stage2__validate_every=4, stage2__save_every=4, stage2__keep=2)
    train_all(config, "sampling.shift=2")
    run = tmp_path / "run"
    flags = ["--num-images", "4", "--guidance-scale", "2"]
    plain = draw(run, tmp_path / "plain", *flags)["x"]
    pipe = trained_run.open_pipeline(run)
    pipe.scheduler = make_scheduler("flow", "heun", 2.0)
    pipe.register_to_config(guidance_interval=[0.2, 0.6])
    expected = pipe(torch.arange(4), seed=0, guidance_scale=2.0, num_inference_steps=3).values
    assert not np.array_equal(expected, plain)
    more = ["--sampler", "heun", "--guidance-interval", "0.2", "0.6"]
    assert np.array_equal(draw(run, tmp_path / "heun", *flags, *more)["x"], expected)
    half = draw(run / "pipeline", tmp_path / "half", *flags, "--dtype", "bf16")["x"]
    full = draw(run / "pipeline", tmp_path / "full", *flags)["x"]
    assert 0 < np.abs(half - full).mean() < 0.1 * np.abs(full).mean()
    checkpoints = run / "stage2_diffusion" / "checkpoints"
    for step, score in ((4, 0.1), (8, 0.9)):
        path = checkpoints / f"step_{step:08d}"
        (path / "training.json").write_text(json.dumps({"step": step, "score": score}))
        (path / disk.MANIFEST).unlink()
        disk.seal(path)
    best = draw(run, tmp_path / "best", *flags, "--checkpoint", "best")["x"]
    shutil.rmtree(checkpoints / "step_00000008")
    assert np.array_equal(best, draw(run, tmp_path / "four", *flags)["x"])
    assert not np.array_equal(best, plain)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "ddim"], "ddim does not fit objective flow; take euler or heun or dpmpp"),
        (["--guidance-interval", "0.8", "0.2"], "--guidance-interval: 0 <= LOW <= HIGH <= 1"),
        (["--checkpoint", "best"], "is an exported pipeline; it holds one"),
    ],
)
def test_what_does_not_fit_a_pipeline_is_one_line(trained, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        draw(trained / "pipeline", tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


def test_previews_are_samples_in_one_precision(tiny, tmp_path):
    """Of a training in bfloat16, too: the same noise draws the same bytes in a preview and afterwards."""
    config = tiny(stage1__mixed_precision="bf16", stage2__mixed_precision="bf16")
    train_all(config, "stage1.max_steps=1", "stage2.max_steps=1")
    pipe = trained_run.open_pipeline(tmp_path / "run")
    drawn = pipe(torch.arange(36) % 10, seed=0, guidance_scale=1.0, num_inference_steps=20).pixels
    with Image.open(tmp_path / "run" / "stage2_diffusion" / "previews" / "step_00000001.png") as preview:
        assert np.array_equal(np.asarray(preview), np.asarray(grids.grid(drawn)))


def test_own_class_runs_no_code_of_the_folder(trained, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(trained / "pipeline", folder)
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('this code must not run')")
    assert LatentDiffusionPipeline.from_pretrained(folder).latent_shape == (4, 4, 4)


def test_an_exported_folder_names_no_place(trained):
    for file in trained.glob("pipeline/**/*.json"):
        assert str(trained) not in file.read_text() and "_name_or_path" not in json.loads(file.read_text()), (
            file
        )


def test_guidance_is_its_formula(trained):
    pipe = trained_run.open_pipeline(trained)
    z, t, labels = torch.randn(3, 4, 4, 4), torch.tensor(500.0), torch.tensor([1, 2, 3])
    with torch.no_grad():
        null = pipe.unet(z, t, class_labels=torch.full((3,), 10)).sample
        known = pipe.unet(z, t, class_labels=labels).sample
        torch.testing.assert_close(
            pipe.predictor(3, labels, 2.5)(z, t), null + 2.5 * (known - null), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(pipe.predictor(3, labels, 1.0)(z, t), known)
        torch.testing.assert_close(pipe.predictor(3, None, 2.5)(z, t), null)


def test_a_guide_is_the_average_of_an_early_step_and_guidance_leads_away_from_it(tiny, tmp_path):
    """Autoguidance: the guide stands still from its step on, survives a resume to the byte, and reaches both
    ways to sample."""
    import stage2_diffusion.train

    config = tiny(data__label_column=None, stage2__guide_at=0.5, sampling__guidance_scale=2.0)
    train_all(config)
    run = tmp_path / "run"
    early, last = (run / f"stage2_diffusion/checkpoints/step_{step:08d}" for step in (4, 8))
    weights = "diffusion_pytorch_model.safetensors"
    kept = (last / "guide" / weights).read_bytes()
    assert kept == (early / "unet" / weights).read_bytes() != (last / "unet" / weights).read_bytes()
    for folder in (last, run / "pipeline"):
        shutil.rmtree(folder)
    call(stage2_diffusion.train.main, "--config", config)
    assert (
        (last / "guide" / weights).read_bytes() == kept == (run / "pipeline" / "guide" / weights).read_bytes()
    )
    exported = draw(
        run / "pipeline", tmp_path / "b", "--guidance-scale", "2", "--num-images", "6", "--num-steps", "3"
    )
    np.testing.assert_array_equal(draw(run, tmp_path / "a")["x"], exported["x"])
    assert not np.array_equal(
        draw(run, tmp_path / "c", "--guidance-scale", "1")["x"], draw(run, tmp_path / "a")["x"]
    )
    pipe, z, t = (
        LatentDiffusionPipeline.from_pretrained(run / "pipeline"),
        torch.randn(3, 4, 4, 4),
        torch.tensor(500.0),
    )
    with torch.no_grad():
        worse, own = pipe.guide(z, t).sample, pipe.unet(z, t).sample
        torch.testing.assert_close(
            pipe.predictor(3, None, 2.5)(z, t), worse + 2.5 * (own - worse), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(pipe.predictor(3, None, 1.0)(z, t), own)


def test_the_guide_is_told_no_class_where_the_recipe_says_so(tiny, tmp_path):
    train_all(tiny(stage2__guide_at=0.5, sampling__unconditional_guide=True))
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    z, t, labels = torch.randn(3, 4, 4, 4), torch.tensor(500.0), torch.tensor([1, 2, 3])
    for told in (torch.full((3,), len(pipe.config.classes)), labels):
        with torch.no_grad():
            worse = pipe.guide(z, t, class_labels=told).sample
            own = pipe.unet(z, t, class_labels=labels).sample
            expected = worse + 2.5 * (own - worse)
            torch.testing.assert_close(pipe.predictor(3, labels, 2.5)(z, t), expected, atol=1e-5, rtol=1e-4)
        pipe.register_to_config(sampling=pipe.config.sampling | {"unconditional_guide": False})


def test_guidance_acts_within_its_interval_only(trained):
    pipe = trained_run.open_pipeline(trained)
    noise, labels = pipe.noises(0, 2), torch.arange(2)
    everywhere, nowhere = (
        pipe.sample(noise, labels, scale, 4) for scale in (3.0, 1.0)
    )  # at t = 1, 0.75, 0.5 and 0.25
    found = {}
    for interval in ([0.0, 1.0], [0.0, 0.7], [0.3, 0.7], [0.8, 0.9]):
        pipe.register_to_config(guidance_interval=interval)
        calls, whole = [], pipe.unet.forward
        pipe.unet.forward = lambda z, *rest, whole=whole, calls=calls, **named: (
            calls.append(len(z)) or whole(z, *rest, **named)
        )
        found[str(interval)] = (pipe.sample(noise, labels, 3.0, 4), calls)
        pipe.unet.forward = whole
    assert torch.equal(found["[0.0, 1.0]"][0], everywhere) and torch.equal(found["[0.8, 0.9]"][0], nowhere)
    assert [calls for _, calls in found.values()] == [[4, 4, 4, 4], [2, 2, 4, 4], [2, 2, 4, 2], [2, 2, 2, 2]]


def test_values_come_back_in_the_user_s_units(tiny, tmp_path, monkeypatch):
    """A recipe of arrays without stage 2: samples of the VAE's prior, each channel in its units and range."""
    import stage1_vae.train

    np.save(
        tmp_path / "fields.npy",
        (np.random.default_rng(0).gamma(1.0, 80.0, (32, 2, 16, 16))).astype(np.float32),
    )
    data = {
        "source": str(tmp_path / "fields.npy"),
        "channels": 2,
        "image_size": 16,
        "value_transform": {"kind": "log1p", "scale": 10.0},
    }
    config = tiny(data=data, stage2=None)
    call(stage1_vae.train.main, "--config", config)
    samples = draw(tmp_path / "run", tmp_path / "out")["x"]
    transform = ValueTransform.from_pretrained(
        next((tmp_path / "run/stage1_vae/checkpoints").iterdir()) / "value_transform"
    )
    assert samples.shape == (6, 2, 16, 16) and samples.dtype == np.float32
    high = transform.config["high"]  # of each channel
    assert len(high) == 2 and min(high) > 100
    assert samples.min() >= 0 and (samples.max((0, 2, 3)) <= np.array(high) * 1.001).all()


def test_an_image_of_ones_own_is_changed_and_painted_into(trained, tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    for name, picture in (("mine.png", given), ("mask.png", mask)):
        Image.fromarray(picture).save(tmp_path / name)
    flags = ["--num-images", "5", "--batch-size", "2", "--image", tmp_path / "mine.png"]
    near, far = (draw(trained, tmp_path / s, *flags, "--strength", s)["x"] for s in ("0.2", "0.9"))
    assert "label" not in np.load(tmp_path / "0.2" / "samples.npz")  # of no class, unless one is named
    assert set(draw(trained, tmp_path / "7", *flags, "--label", "7")["label"]) == {7}
    assert near.shape == far.shape == (5, 1, 16, 16) and not np.array_equal(near, far)
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    call(generate.main, "--run", tmp_path / "run", *flags, "--strength", "0.2")
    assert (tmp_path / "run" / "edits" / "grid.png").is_file()
    assert not (tmp_path / "run" / "samples").exists()  # samples are shown and published
    painted = draw(trained, tmp_path / "painted", *flags, "--mask", tmp_path / "mask.png")["x"]
    assert np.array_equal(painted[:, 0, :, :8], np.broadcast_to(given[:, :8], (5, 16, 8)))
    np.save(tmp_path / "mine.npy", given[None].astype(np.float32))
    again = draw(trained, tmp_path / "npy", *flags[:-1], tmp_path / "mine.npy", "--strength", "0.2")["x"]
    assert np.array_equal(again, near)


def test_each_of_several_images_is_changed_once(trained, tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16)).astype(np.float32)
    flags = ("--batch-size", "2", "--strength", "0", "--image", tmp_path / "mine.npy")
    np.save(tmp_path / "mine.npy", given)
    x = draw(trained, tmp_path / "all", *flags, "--num-images", "5")["x"]
    np.save(tmp_path / "mine.npy", given[4:])
    alone = draw(trained, tmp_path / "one", *flags, "--num-images", "1")["x"]
    assert np.abs(x[4].astype(float) - alone[0]).max() <= 1
    np.save(tmp_path / "mine.npy", given)
    with pytest.raises(InputError, match="--image: holds 5 images: --num-images 5"):
        draw(trained, tmp_path / "many", *flags, "--num-images", "64")
    given[2, 0, 3, 3] = np.nan
    np.save(tmp_path / "mine.npy", given)
    with pytest.raises(InputError, match="image: values that are not finite"):
        draw(trained, tmp_path / "nan", *flags, "--num-images", "5")


def test_bright_edges_of_a_16_bit_picture_do_not_turn_black(trained, tmp_path):
    bright = np.zeros((32, 32), np.uint16)
    bright[:, 10:] = 65535
    mask = np.zeros((16, 16), np.uint8)
    mask[:2] = 255
    Image.fromarray(bright).save(tmp_path / "bright.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ("--image", tmp_path / "bright.png", "--mask", tmp_path / "mask.png")
    x = draw(trained, tmp_path / "out", *files, "--num-images", "1")["x"][0, 0]
    assert (x[4:, 7:] > 200).all() and (x[4:, :4] < 50).all()


def test_a_way_between_two_images_begins_and_ends_at_them(trained, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    ends = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    pipe = trained_run.open_pipeline(trained)
    pixels = tasks.between_images(pipe, ends, 7, None, 4)
    first, last = (pipe(image=Image.open(end), strength=0.0).pixels[0] for end in ends)
    far = (first - last).square().mean()
    assert (pixels[0] - first).square().mean() < 0.05 * far
    assert (pixels[-1] - last).square().mean() < 0.05 * far
    steps = (pixels[1:] - pixels[:-1]).square().mean((1, 2, 3))
    assert steps.max() < far  # no leap from one to the other
    call(generate.main, "--run", trained, "--out", tmp_path, "--interpolate", *ends, "--num-images", "5")
    with Image.open(tmp_path / "interpolate_a_b.gif") as gif:
        assert gif.n_frames >= 4


def test_a_way_has_one_image_at_each_end(trained, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        np.save(tmp_path / f"{name}.npy", np.zeros((count, 1, 16, 16), np.float32))
    ends = [str(tmp_path / f"{name}.npy") for name in ("two", "one")]
    with pytest.raises(InputError, match="hold 3 images; one in each"):
        call(generate.main, "--run", trained, "--out", tmp_path, "--interpolate", *ends)


def test_upscaling_a_small_picture(trained, tmp_path, capsys):
    small = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    flags = ("--num-images", "3", "--image", tmp_path / "small.png", "--upscale", "4")
    x = draw(trained, tmp_path / "large", *flags)["x"].astype(float)
    assert x.shape == (3, 1, 16, 16)
    assert "is shrunk" not in capsys.readouterr().out
    Image.fromarray(np.tile(small, (4, 4))).save(tmp_path / "large.png")
    draw(
        trained, tmp_path / "again", "--image", tmp_path / "large.png", "--upscale", "4", "--num-images", "1"
    )
    assert "note: --image: 16x16 px is shrunk to 4x4, to be drawn anew in 16x16" in capsys.readouterr().out
    means = x.reshape(3, 4, 4, 4, 4).mean((2, 4))
    fresh = draw(trained, tmp_path / "fresh", "--num-images", "3")["x"].reshape(3, 4, 4, 4, 4).mean((2, 4))
    assert np.abs(means - small).mean() < np.abs(fresh - small).mean()  # an untrained VAE draws one grey


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask", "x.png"], "Name it with --image"),
        (["--image", "nowhere.png"], "--image: nowhere.png cannot be read"),
        (["--image", "x.png", "--strength", "2"], "--strength: between 0 and 1"),
        (["--image", "x.png", "--interpolate", "1", "2"], "--interpolate: is between two seeds or two files"),
        (["--image", "x.png", "--upscale", "1"], "--upscale: a factor of 2 or more"),
        (["--image", "x.png", "--upscale", "4", "--strength", "0.5"], "--upscale: a factor of 2 or more"),
        (["--upscale", "4"], "Name it with --image"),
        (["--image", "torn.png"], "--image: torn.png cannot be read"),
        (["--image", "empty.npy"], "--image: empty.npy cannot be read"),
        (["--interpolate", "1", "nowhere.png"], "--interpolate: 1 cannot be read"),
    ],
)
def test_what_is_wrong_with_an_edit_is_one_line(trained, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    Image.fromarray(noise).save("torn.png")
    head, _, tail = Path("torn.png").read_bytes().rpartition(b"IDAT")
    Path("torn.png").write_bytes(head + b"\xff" * 4 + tail)
    Path("empty.npy").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        draw(trained, tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


def test_a_folder_saved_by_hand_draws_the_same(trained, tmp_path):
    LatentDiffusionPipeline.from_pretrained(trained / "pipeline").save_pretrained(tmp_path / "mine")
    ours = draw(tmp_path / "mine", tmp_path / "a", "--num-images", "6")
    assert np.array_equal(ours["x"], draw(trained, tmp_path / "b")["x"])
    assert [ours["classes"][label] for label in ours["label"]] == list("012345")


def test_what_cannot_be_written_is_said_before_anything_is_drawn(trained, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(generate, "opened", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(InputError, match="taken.*: cannot be written"):
        draw(trained, tmp_path / "taken" / "samples")


def test_calls_as_users_of_diffusers_write_them(trained):
    pipe = LatentDiffusionPipeline.from_pretrained(trained / "pipeline", dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    pipe = LatentDiffusionPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    listed = pipe([3, 4], seed=0, num_inference_steps=2).latents
    assert torch.equal(listed, pipe(np.array([3, 4]), seed=0, num_inference_steps=2).latents)
    assert len(pipe(np.int64(3), seed=0, num_inference_steps=2).latents) == 1
