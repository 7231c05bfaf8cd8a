"""What evaluate reports is what the model does, in the units it says."""

import json

import pytest
import torch

from shared import data, evaluate
from shared.config import InputError
from shared.pipeline import LatentDiffusionPipeline
from shared.recipe import open_run
from tests.conftest import call


def test_figures_are_those_of_the_model(trained):
    call(evaluate.main, "--run", trained)
    written = json.loads((trained / "report" / "metrics.json").read_text())
    scores = written["reconstruction"]
    pipe = LatentDiffusionPipeline.from_vae(trained / "latents")
    _, recipe = open_run(trained)
    _, val = data.split(data.open_source(recipe.data), recipe.data)
    assert written["images"] == len(val) == 6
    x = data.fit_transform(val, recipe.data)(val.__getitems__(list(range(6)))["raw"])
    with torch.no_grad():
        posterior = pipe.vae.encode(x).latent_dist
        x_hat = pipe.vae.decode(posterior.mean).sample
    assert scores["mse"] == pytest.approx((x - x_hat).square().mean().item(), rel=1e-4)
    assert scores["kl"] == pytest.approx(posterior.kl().mean().item(), rel=1e-4)  # diffusers sums over the latent
    y, p = (x + 1) / 2, (x_hat + 1) / 2
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).flatten(1).sum(1).mean().item()
    assert scores["bce"] == pytest.approx(bce, rel=0.1)  # drawn from the posterior there, its mean here


def test_a_run_without_a_checkpoint(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(tiny().read_text())
    with pytest.raises(InputError, match="no checkpoint yet"):
        call(evaluate.main, "--run", tmp_path / "run")
