"""What evaluate reports is what the model does, in the units it says."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import stage1_vae.train
from shared import doctor, evaluate, recipe
from shared import trained as trained_run
from shared.config import InputError
from shared.data import sources, splits
from shared.data.config import DataConfig
from shared.measure import features, images, samples
from shared.run import RunFolder, open_run
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.training.processes import make_accelerator
from tests.conftest import TORCHRUN, call, command


@pytest.fixture(scope="module")
def measured(trained):
    call(evaluate.main, "--run", trained, "--num-images", "16")
    return json.loads((trained / "report" / "metrics.json").read_text())


def test_figures_are_those_of_the_model(measured, trained):
    scores = measured["reconstruction"]
    pipe = LatentDiffusionPipeline.from_vae(trained / "latents")
    _, recipe = open_run(trained)
    _, val = splits.split(sources.open_source(recipe.data), recipe.data)
    assert measured["images"] == len(val) == 6
    x = splits.fit_transform(val, recipe.data)(val.__getitems__(list(range(6)))["raw"])
    with torch.no_grad():
        posterior = pipe.vae.encode(x).latent_dist
        x_hat = pipe.vae.decode(posterior.mean).sample
    assert scores["mse"] == pytest.approx((x - x_hat).square().mean().item(), rel=1e-4)
    assert scores["mean_image_mse"] == pytest.approx(x.var(0, unbiased=False).mean().item(), rel=1e-4)
    assert scores["kl"] == pytest.approx(
        posterior.kl().mean().item(), rel=1e-4
    )  # diffusers sums over the latent
    y, p = (x + 1) / 2, (x_hat + 1) / 2
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).flatten(1).sum(1).mean().item()
    assert scores["bce"] == pytest.approx(bce, rel=0.1)  # drawn from the posterior there, its mean here


def test_the_fid_of_reconstructions_is_theirs_and_the_floor_is_of_training_images(measured, trained):
    run, recipe = open_run(trained)
    training, val = splits.split(sources.open_source(recipe.data), recipe.data)
    vae, transform, _ = trained_run.open_vae(run, "cpu")
    x, labels = images.pixels(training, transform, len(training))
    extractor = features.own(x, labels, "cpu")
    held_out, _ = images.pixels(val, transform, len(val))
    x_hat = images.decode(vae, images.encode(vae, held_out, "cpu")[0], "cpu")
    real = extractor(held_out)
    assert measured["rfid"] == pytest.approx(features.fid(extractor(x_hat), real), rel=1e-3)
    assert measured["floor_images"] == 16
    floor = extractor(x[splits.evenly(len(x), 16)])
    expected = features.fid(floor, real)
    assert measured["training_against_held_out"]["fid"] == pytest.approx(expected, rel=1e-3)


def test_statistics_of_a_class_are_of_its_own_images(tmp_path):
    values = torch.arange(2.0).repeat(8).view(16, 1, 1, 1).expand(16, 1, 8, 8)
    nothing = torch.zeros(16, 1)
    seen = features.Seen(nothing, nothing, values=values, labels=torch.arange(16) % 2)
    found = samples.statistics(tmp_path, "generic", ["u"], seen, seen, ["a", "b"])
    assert [found[name]["u: value"]["generated"] for name in "ab"] == [0, 1]


@pytest.mark.parametrize("count", [16, 70])  # one batch, which one process draws; two batches
def test_processes_do_not_matter_to_samples(trained, tmp_path, count):
    found = []
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        shutil.copytree(trained, tmp_path / name)
        command(
            "-m",
            "shared.evaluate",
            "--run",
            tmp_path / name,
            "--num-images",
            count,
            launcher=launcher,
        )
        found.append(json.loads((tmp_path / name / "report" / "metrics.json").read_text()))
    one, two = found
    assert one["samples"] == pytest.approx(two["samples"], rel=1e-3)
    assert one["memorisation"] == pytest.approx(two["memorisation"], rel=1e-4)


def test_every_figure_stands_beside_its_extractor_and_its_numbers(measured):
    assert measured["generated_images"] == 16 and measured["real_images"] == 6
    assert measured["extractor"] == "classifier of the 10 classes, 256 features"
    assert measured["samples"].keys() >= {
        "fid",
        "kid",
        "kid_deviation",
        "precision",
        "recall",
        "inception_score",
    }
    assert measured["memorisation"].keys() >= {"samples_to_training", "held_out_to_training"}


def test_copies_of_training_images_are_told(trained):
    """FID and KID praise them."""
    _, recipe = open_run(trained)
    training, val = splits.split(sources.open_source(recipe.data), recipe.data)
    transform = splits.fit_transform(training, recipe.data)
    seen, held_out = (
        features.shrunk(transform(part.__getitems__(list(range(6)))["raw"])) for part in (training, val)
    )
    accelerator = make_accelerator(recipe.stage1)
    told = [
        samples.memorisation(drawn, held_out, training, transform, accelerator)[0]
        for drawn in (seen, held_out + 0.01)
    ]
    copied, others = ({"memorisation": figures} for figures in told)
    assert samples.told_of_copies(copied).startswith("note: 100% of the samples")
    assert samples.told_of_copies(others) is None is samples.told_of_copies({})


@pytest.mark.parametrize(("held_out", "by_chance"), [(6, 0.15), (99, 0.0198)])
def test_what_chance_gives_is_known_for_few_held_out_images(held_out, by_chance):
    """Of equal distances; the least of six is no first percent, and no sign of copies."""
    rng, shares = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        figures = samples.nearness(torch.rand(100, generator=rng), torch.rand(held_out, generator=rng))
        shares.append(figures["share_nearer_than_99_percent_of_held_out"])
        assert held_out > 6 or samples.told_of_copies({"memorisation": figures}) is None or shares[-1] > 0.7
    assert np.mean(shares) == pytest.approx(figures["by_chance"], rel=0.1)
    assert figures["by_chance"] == pytest.approx(by_chance)


def test_of_its_own_images_no_memorisation_is_said(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    call(evaluate.main, "--run", tmp_path / "run", "--split", "train", "--num-images", "8")
    found = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert "memorisation" not in found and found["split"] == "train" and found["real_images"] == 8


def test_the_library_agrees_on_ssim():
    from torchmetrics.functional.image import structural_similarity_index_measure as library

    from shared.training.similarity import ssim

    x, noise = torch.rand(3, 1, 32, 32) * 2 - 1, torch.randn(3, 1, 32, 32)
    x_hat = (x + 0.2 * noise).clamp(-1, 1)
    expected = library((x_hat + 1) / 2, (x + 1) / 2, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(x_hat, x), expected)
    assert ssim(x[:, :, :4, :4], x[:, :, :4, :4]).tolist() == pytest.approx(
        [1, 1, 1]
    )  # smaller than its window


def test_ssim_is_not_computed_in_bfloat16():
    from shared.training.similarity import ssim
    from stage1_vae.losses import ms_ssim_term

    x = 0.9 + 0.02 * torch.rand(
        2, 1, 32, 32
    )  # bright and flat: the variances are small differences of large numbers
    x_hat = x + 0.001
    whole = ssim(x_hat, x), ms_ssim_term(x_hat, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close((ssim(x_hat, x), ms_ssim_term(x_hat, x)), whole)


def test_samples_have_the_classes_of_the_training_images():
    from shared.sampling.tasks import labels_like

    seen = torch.tensor([0] * 90 + [1] * 10)
    assert torch.bincount(labels_like(seen, ["a", "b"], 200)).tolist() == pytest.approx([180, 20], abs=2)
    assert labels_like(None, ["a", "b"], 4).tolist() == [0, 1, 0, 1] and labels_like(seen, [], 4) is None


def test_reconstructions_are_kept_where_samples_cannot_be_judged(tiny, trained, tmp_path):
    import shutil

    shutil.copytree(
        trained, tmp_path / "run", ignore=shutil.ignore_patterns("stage2_diffusion", "pipeline", "report")
    )
    with pytest.raises(InputError, match="nothing to sample from yet"):
        call(evaluate.main, "--run", tmp_path / "run")
    assert "reconstruction" in json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())


def test_a_field_is_judged_by_its_own_statistics(tiny, tmp_path):
    import numpy as np

    from shared.data import simulate
    from tests.conftest import train_all

    jets = np.stack([simulate.jet(i, 16) for i in range(60)])
    np.savez(tmp_path / "jets.npz", x=jets, label=np.arange(60) % 2)
    model = {"channels": [8, 16], "head": "conv", "latent_shape": [4, 4, 4]}
    config = tiny(
        data={
            "source": str(tmp_path / "jets.npz"),
            "image_size": 16,
            "channels": 3,
            "val_fraction": 0.3,
            "field": "jets",
        },
        stage1__model=model,
        stage1__loss_weights={"weighted_mse": 1.0, "kl": 0.01},
    )
    train_all(config)
    call(evaluate.main, "--run", tmp_path / "run", "--num-images", "20")
    found = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert found["statistics"].keys() == {"all", "0", "1"}
    assert {"multiplicity", "energy (GeV)", "radial profile", "occupancy"} <= found["statistics"]["1"].keys()
    assert found["reconstruction"]["weighted_mse"] > 0
    assert (tmp_path / "run" / "report" / "statistics.png").is_file()


def test_a_run_without_a_checkpoint(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(tiny().read_text())
    with pytest.raises(InputError, match="no checkpoint yet"):
        call(evaluate.main, "--run", tmp_path / "run")
    with pytest.raises(InputError, match="--num-images"):
        call(evaluate.main, "--run", tmp_path / "run", "--num-images", "2")


def test_a_split_without_some_classes_is_numbered_as_training_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = np.random.default_rng(0).random((12, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "train.npz", x=x, label=np.array(["a", "b", "c"] * 4))
    np.savez(tmp_path / "test.npz", x=x[:4], label=np.array(["b", "c", "c", "d"]))
    data = DataConfig(source=str(tmp_path), channels=1, image_size=8, val_fraction=0.25)
    chosen = replace(recipe.load(tiny()), data=data)
    training, part, _ = trained_run.open_images(RunFolder(tmp_path / "run"), chosen, "test")
    assert training.source.names == part.source.names == ["a", "b", "c"]
    assert part.labels(range(4)).tolist() == [1, 2, 2, -1]


@pytest.mark.parametrize("main", [evaluate.main, doctor.main])
def test_other_images_than_those_of_the_training_are_one_line(tiny, tmp_path, main):
    """What is held out of them may have been learned."""
    x = np.random.default_rng(0).integers(0, 256, (64, 1, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    call(stage1_vae.train.main, "--config", tiny(data={"source": str(tmp_path / "x.npy"), "image_size": 16}))
    np.save(tmp_path / "x.npy", x[:60])
    with pytest.raises(InputError, match="no longer holds what was trained on"):
        call(main, "--run", tmp_path / "run")
