"""The adversarial term: its closed forms, when it begins, and that it leaves nothing where it should not."""

import pytest
import torch

from shared import recipe
from shared.data import batches
from shared.training.processes import make_accelerator
from stage1_vae import discriminator, train
from stage1_vae.config import DiscriminatorConfig
from stage1_vae.losses import Reconstruction
from stage1_vae.stage import VAEStage
from tests.conftest import TORCHRUN, TRAIN1, assert_equal_bits, call, command, training_tensors

ADVERSARIAL = {
    "stage1__loss_weights": {"l1": 1.0, "kl": 0.02, "adversarial": 0.1},
    "stage1__discriminator": {"channels": [8, 16], "start_step": 3, "ramp_steps": 2},
}


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    # max(0, 1 - real): 0 and 0.5; max(0, 1 + fake): 0 and 1.5
    assert discriminator.hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.75))
    assert discriminator.adversarial_term(fake).item() == pytest.approx(1.25)


def test_a_logit_for_each_patch():
    judge = discriminator.PatchDiscriminator(3, [8, 16])
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    logits = judge(x)
    assert logits.shape == (1, 1, 8, 8)
    logits[0, 0, 0, 0].backward()  # group normalisation sees the whole image, but only a little
    near, far = x.grad[..., :16, :16].abs().mean(), x.grad[..., 24:, 24:].abs().mean()
    assert near > 5 * far


def test_start_and_ramp():
    config = DiscriminatorConfig(start_step=10, ramp_steps=4)
    weights = [discriminator.adversarial_weight(0.5, config, step) for step in (0, 9, 10, 12, 14, 99)]
    assert weights == pytest.approx([0, 0, 0.1, 0.3, 0.5, 0.5])
    assert discriminator.adversarial_weight(0.5, DiscriminatorConfig(), 0) == 0.5


def test_before_its_start_the_vae_trains_as_if_it_were_not_there(tiny, tmp_path):
    call(train.main, "--config", tiny(stage1__max_steps=3, run_dir=str(tmp_path / "plain")))
    call(train.main, "--config", tiny(**ADVERSARIAL, stage1__max_steps=3, run_dir=str(tmp_path / "with")))
    plain, both = (training_tensors(tmp_path / name, "stage1_vae") for name in ("plain", "with"))
    assert_equal_bits(plain, {name: value for name, value in both.items() if name in plain})
    assert not any(name.startswith("optimizer/discriminator") for name in both)


@pytest.mark.parametrize(("steps", "said"), [(3, True), (4, False)])
def test_one_that_never_begins_is_said(tiny, capsys, steps, said):
    call(train.main, "--config", tiny(**ADVERSARIAL, stage1__max_steps=steps))
    assert ("note: without the adversarial term" in capsys.readouterr().out) is said


def test_a_step_teaches_it_to_tell_images_from_reconstructions(tiny):
    """At its own rate."""
    settings = recipe.load(tiny(**ADVERSARIAL))
    stage = VAEStage(settings.stage1, settings.data, settings.seed, make_accelerator(settings.stage1))
    x, x_hat = torch.rand(8, 1, 16, 16) * 2 - 1, torch.zeros(8, 1, 16, 16)
    for step in range(20):
        stage.optimizers["discriminator"].begin(step, 0, 1)
        logs = stage._train_discriminator(x, x_hat)
    assert stage.raw_discriminator(x).mean() > stage.raw_discriminator(x_hat).mean()
    assert logs["lr/discriminator"] == settings.stage1.discriminator.lr != settings.stage1.optim.lr


def test_the_vae_leaves_no_gradient_in_the_discriminator(tiny):
    settings = recipe.load(tiny(**ADVERSARIAL))
    accelerator = make_accelerator(settings.stage1)
    stage = VAEStage(settings.stage1, settings.data, settings.seed, accelerator)
    discriminator = stage.models["discriminator"]
    x = stage.transform(next(batches.batches(stage.data, settings.stage1, 0, 0, 1, accelerator))["raw"])
    discriminator.requires_grad_(False)
    logits, mean, logvar = stage.vae(x, noise=torch.zeros(len(x), 4, 4, 4))
    seen = Reconstruction(x, logits, stage.raw_vae.activate(logits), mean, logvar)
    terms = stage._terms(seen, stage.weights, stage.lpips)
    terms["adversarial"].backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in stage.models["vae"].decoder.parameters()
    )


def test_resume_is_bit_equal_with_the_discriminator(tiny, tmp_path):
    call(train.main, "--config", tiny(**ADVERSARIAL, run_dir=str(tmp_path / "whole")))
    for steps in (5, 8):
        call(
            train.main,
            "--config",
            tiny(**ADVERSARIAL, stage1__max_steps=steps, run_dir=str(tmp_path / "parts")),
        )
    whole, parts = (training_tensors(tmp_path / name, "stage1_vae") for name in ("whole", "parts"))
    assert any(name.startswith("optimizer/discriminator") for name in whole)
    assert_equal_bits(whole, parts)


def test_two_processes_are_as_good_as_one(tiny, tmp_path):
    one, two = (tiny(f"{name}.yaml", **ADVERSARIAL, run_dir=str(tmp_path / name)) for name in ("one", "two"))
    call(train.main, "--config", one)
    command(TRAIN1, "--config", two, launcher=TORCHRUN)
    one, two = (training_tensors(tmp_path / name, "stage1_vae") for name in ("one", "two"))
    for name in one:
        if name.startswith("model/"):
            torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
