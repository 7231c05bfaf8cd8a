"""The doctor's numbers against closed forms, and the alarm on VAEs built to be ill."""

import math

import pytest
import torch

from stage1_vae import diagnostics
from stage1_vae.losses import pixel_weights, weighted_mse_term
from stage1_vae.model import DeepVAE


def test_active_units_of_a_vae_built_to_have_k_of_n():
    torch.manual_seed(0)
    vae = DeepVAE(1, 16, [8], latent_shape=[8, 1, 1], head="linear")
    head = vae.to_moments[-2]
    with torch.no_grad():
        head.weight[3:8] = 0  # the means of five latents no longer see the image
        head.weight[:3] *= 20
        mean, logvar = vae.moments(torch.rand(200, 1, 16, 16) * 2 - 1)
    assert diagnostics.active_units(mean) == 3
    assert (diagnostics.kl_bits(mean, logvar).flatten()[3:8] < 1).all()


def test_bits_are_nats_over_log_2():
    mean, logvar = torch.full((4, 3, 1, 1), 2.0), torch.zeros(4, 3, 1, 1)
    torch.testing.assert_close(diagnostics.kl_bits(mean, logvar), torch.full((3, 1, 1), 2.0 / math.log(2)))


def test_the_aggregate_posterior_adds_both_variances():
    torch.manual_seed(0)
    mean, logvar = 3 + 0.6 * torch.randn(100_000, 1, 1, 1), torch.full((100_000, 1, 1, 1), math.log(0.64))
    centre, width = diagnostics.aggregate(mean, logvar)
    assert centre.item() == pytest.approx(3, abs=0.01) and width.item() == pytest.approx(1, abs=0.01)


def test_spread_is_that_of_all_images_at_once():
    x, x_hat = torch.rand(2, 30, 3, 8, 8)
    spread = diagnostics.PixelVariance()
    for rows in (slice(0, 7), slice(7, 30)):
        spread.add(x[rows], x_hat[rows])
    found = spread.numbers()
    assert found["mse"].item() == pytest.approx((x - x_hat).square().mean().item())
    assert found["mean_image_mse"].item() == pytest.approx((x - x.mean(0)).square().mean().item())
    assert found["reconstruction_variance"].item() == pytest.approx(
        x_hat.var(0, unbiased=False).mean().item()
    )


def test_the_best_constant_image_by_weight_cannot_be_bettered():
    x = torch.rand(50, 1, 4, 4) * 2 - 1
    spread = diagnostics.PixelVariance(activity_weight=20.0)
    for part in x.split(13):
        spread.add(part, part)
    found = spread.numbers()["mean_image_weighted_mse"].item()
    weights = pixel_weights(x, 20.0)
    best = (weights * x).mean(0) / weights.mean(0)
    assert found == pytest.approx(weighted_mse_term(best.expand_as(x), x, 20.0).item(), rel=1e-5)
    assert found < weighted_mse_term(x.mean(0).expand_as(x), x, 20.0).item()


ILLNESSES = {
    "well": ({"mse": 0.01, "reconstruction_variance": 0.19, "active": 60}, None),
    "beta too strong": (
        {"mse": 0.2, "reconstruction_variance": 1e-5, "active": 0},
        "beta too strong.*lower stage1.loss_weights.kl",
    ),
    "dead decoder": (
        {"mse": 0.5, "reconstruction_variance": 0.0, "active": 10},
        "dead decoder.*output_activation: none",
    ),
    "mean image": (
        {"mse": 0.195, "reconstruction_variance": 0.001, "active": 10},
        "mean image.*weighted_mse",
    ),
    "few": ({"mse": 0.1, "reconstruction_variance": 0.1, "active": 3}, "only 3 of 64"),
}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_the_alarm_names_cause_and_cure(illness):
    facts, words = ILLNESSES[illness]
    found = diagnostics.collapse(**facts, mean_image_mse=0.2, dz=64, beta=0.1)
    if words is None:
        assert found is None
    else:
        import re

        assert re.search(words, found)


def test_an_autoencoder_is_not_blamed_for_its_beta():
    found = diagnostics.collapse(
        mse=0.2, mean_image_mse=0.2, reconstruction_variance=0.0, active=0, dz=64, beta=0.0
    )
    assert "beta" not in found


def test_training_says_that_it_has_collapsed(tiny, capsys):
    from stage1_vae import train
    from tests.conftest import call

    collapsing = {
        "stage1__loss_weights": {"l1": 1.0, "kl": 100.0},
        "stage1__max_steps": 40,
        "stage1__validate_every": 40,
    }
    call(train.main, "--config", tiny(**collapsing, data__val_fraction=0.4))
    assert "collapse, beta too strong" in capsys.readouterr().out
