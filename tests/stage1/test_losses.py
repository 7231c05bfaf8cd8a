"""Each term against its closed form or a library, and each by itself reaches the decoder."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from shared import recipe
from shared.config import InputError
from shared.training import processes
from shared.training.keyed import Rows
from shared.training.similarity import BACKBONES, load_lpips, psnr
from stage1_vae import losses
from stage1_vae.config import KLConfig, LossWeights, Stage1Config
from stage1_vae.diagnostics import active_units
from stage1_vae.discriminator import PatchDiscriminator
from stage1_vae.model import DeepVAE
from stage1_vae.stage import VAEStage

WEIGHTS = vars(LossWeights())
CONFIG = Stage1Config()


@pytest.fixture(scope="module")
def random_backbone(tmp_path_factory):
    """LPIPS weights files with random backbones: what is tested on them is how they are loaded, not what they
    see."""
    import torchvision
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    nets = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}
    for net, make in nets.items():
        features = make(weights=None).features
        save_file(
            {f"features.{k}": v.half() for k, v in features.state_dict().items()},
            folder / f"{BACKBONES[net]}.safetensors",
        )
    return folder


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.kl_term(mean, logvar), expected)
    assert losses.kl_term(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


def test_pixel_terms_are_means_over_pixels():
    x, logits = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    x_hat = 2 * logits.sigmoid() - 1
    seen = losses.Reconstruction(x, logits, x_hat, None, None)
    found = losses.terms(seen, WEIGHTS | {"l1": 1, "mse": 1, "bce": 1}, CONFIG)
    y, p = (x + 1) / 2, logits.sigmoid()
    torch.testing.assert_close(found["l1"], (x - x_hat).abs().mean())
    torch.testing.assert_close(found["mse"], (x - x_hat).square().mean())
    torch.testing.assert_close(found["bce"], -(y * p.log() + (1 - y) * (1 - p).log()).mean())


def test_nothing_is_won_by_logits_beyond_the_range_of_pixels():
    """Resized 16-bit pictures overshoot it a little."""
    x = torch.full((1, 1, 4, 4), 1.2)
    assert losses.bce_term(torch.full_like(x, 1e4), x) == 0 == losses.bce_term(torch.full_like(x, -1e4), -x)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_term_alone_reaches_the_network(name, random_backbone):
    torch.manual_seed(0)
    output = "hurdle" if name == "hurdle" else "sigmoid"
    vae = DeepVAE(3, 32, [8, 16], latent_shape=[4, 8, 8], head="conv", output_activation=output)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    network = load_lpips("squeeze", str(random_backbone), "cpu") if name == "lpips" else None
    logits, mean, logvar = vae(x, noise=torch.randn(2, 4, 8, 8))
    discriminator = PatchDiscriminator(3, [8, 16])
    seen = losses.Reconstruction(x, logits, vae.activate(logits), mean, logvar)
    found = losses.terms(seen, WEIGHTS | {name: 1.0}, CONFIG, network, discriminator)
    assert found.keys() == {name}
    found[name].backward()
    part = (
        vae.encoder[0] if name == "kl" else vae.from_latent
    )  # the first layer: everything behind it is on the way
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in part.parameters())


def test_the_hurdle_term_is_a_negative_log_likelihood():
    """But for a constant of each cell that is not empty: of Bernoulli gates and normal values behind them."""
    torch.manual_seed(0)
    logits, y = torch.randn(4, 6, 8, 8), torch.rand(4, 3, 8, 8) * (torch.rand(4, 3, 8, 8) > 0.6)
    weight = 20.0
    spread = (1 / (2 * weight)) ** 0.5
    gate, value = logits.chunk(2, dim=1)
    occupied = (y > 0).float()
    likelihood = torch.distributions.Bernoulli(logits=gate).log_prob(occupied)
    likelihood = likelihood + occupied * torch.distributions.Normal(value, spread).log_prob(y)
    constant = occupied.mean() * math.log(spread * math.sqrt(2 * math.pi))
    found = losses.hurdle_term(logits, 2 * y - 1, weight)
    torch.testing.assert_close(found, -likelihood.mean() - constant)


def test_a_hurdle_has_exact_zeros_and_as_many_as_there_are():
    torch.manual_seed(0)
    settings = {
        "in_channels": 2,
        "image_size": 16,
        "channels": [8],
        "latent_shape": [4, 8, 8],
        "head": "conv",
    }
    vae = DeepVAE(output_activation="hurdle", **settings)
    y = torch.rand(64, 2, 16, 16) * (torch.rand(64, 2, 16, 16) > torch.tensor([0.9, 0.5]).view(2, 1, 1))
    logits = torch.randn(64, 4, 16, 16)
    assert (
        (vae.activate(logits) > -1).float().mean((0, 2, 3)) < 0.3
    ).all()  # half open, half of these above 0
    logits[:, 2:] += 9  # values far above 0
    vae.set_threshold(logits[:, :2], 2 * y - 1)
    found = vae.activate(logits)
    opened, there = (found > -1).sum((0, 2, 3)), (y > 0).sum((0, 2, 3))
    assert torch.equal(opened, there) and (found[found <= -1] == -1).all()
    again = DeepVAE.from_config(vae.config)
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.activate(logits), found)
    vae.set_threshold(logits[:, :2], torch.ones_like(y))
    assert (vae.activate(logits)[:, 0] > -1).all()


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_frozen_and_its_backbone_is_the_file(net, random_backbone):
    from safetensors.torch import load_file

    network = load_lpips(net, str(random_backbone), "cpu")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    file = load_file(random_backbone / f"{BACKBONES[net]}.safetensors")
    assert torch.equal(network.net.slice1[0].weight, file["features.0.weight"].float())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert network(x, x).abs().max() < 1e-6 < network(x, -x).min()


def test_lpips_channels(random_backbone):
    network = load_lpips("alex", str(random_backbone), "cpu")
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    grey = losses.lpips_term(network, a[:, :1], b[:, :1], "repeat")
    torch.testing.assert_close(grey, network(a[:, :1].repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1)).mean())
    each = losses.lpips_term(network, a, b, "each")
    alone = torch.stack(
        [losses.lpips_term(network, a[:, c : c + 1], b[:, c : c + 1], "repeat") for c in range(3)]
    )
    torch.testing.assert_close(each, alone.mean())


def test_lpips_without_its_weights_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="stage1.lpips.weights: no such file"):
        load_lpips("vgg", str(tmp_path), "cpu")
    monkeypatch.setenv("LATENT_STACK_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match="LATENT_STACK_WEIGHTS: no such file"):
        load_lpips("vgg", None, "cpu")
    from safetensors.torch import save_file

    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "vgg16_features.safetensors")
    with pytest.raises(InputError, match="vgg16_features.safetensors: not the weights"):
        load_lpips("vgg", str(tmp_path), "cpu")


def test_lpips_that_cannot_be_downloaded_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENT_STACK_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"could not be downloaded.*loss_weights\.lpips: 0"):
        load_lpips("vgg", None, "cpu")


@pytest.mark.data
@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_real_weights_order_distortions(net, weights, data_sets):
    from shared.data import sources
    from shared.data.config import DataConfig

    network = load_lpips(net, str(weights), "cpu")
    photos = sources.open_source(
        DataConfig(source=str(data_sets / "clothing128"), image_size=128, channels=3)
    )
    x = torch.stack([torch.from_numpy(p) for p in photos.read([0, 500])]).float() / 127.5 - 1
    blurred = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
    near, far = network(x, x + 0.02), network(x, blurred)
    assert (near < 0.1 * far).all() and (network(x, x.flip(0)) > far).all()


def test_beta_over_the_steps():
    def weights(config, steps):
        return [losses.kl_weight(2.0, config, step, max_steps=100) for step in steps]

    assert weights(KLConfig(), (0, 50, 99)) == [2.0, 2.0, 2.0]
    assert weights(KLConfig(kind="linear", warmup_steps=10), (0, 5, 10, 99)) == [0.0, 1.0, 2.0, 2.0]
    assert weights(KLConfig(kind="cosine", warmup_steps=10), (0, 5, 10, 99)) == pytest.approx(
        [0.0, 1.0, 2.0, 2.0]
    )
    cyclical = KLConfig(kind="cyclical", cycles=4, ratio=0.8)  # cycles of 25 steps that rise over 20
    assert weights(cyclical, (0, 10, 20, 24)) == pytest.approx([0.0, 1.0, 2.0, 2.0])
    assert weights(cyclical, range(25)) == pytest.approx(weights(cyclical, range(75, 100)))


def test_free_bits_leave_nothing_to_win_below_the_floor():
    mean = torch.tensor([[0.1, 2.0], [-0.1, -2.0]]).view(2, 2, 1, 1).requires_grad_()
    logvar = torch.zeros(2, 2, 1, 1)
    term = losses.kl_term(mean, logvar, free_bits=0.5)
    assert term.item() == pytest.approx(
        (0.5 + 2.0) / 2
    )  # nats of the dimensions: 0.005 (raised to 0.5) and 2
    term.backward()
    assert (mean.grad[:, 0] == 0).all() and (mean.grad[:, 1] != 0).all()


def test_a_target_is_the_cheapest_kl():
    nats = [
        losses.kl_term(torch.full((1, 4, 1, 1), m), torch.zeros(1, 4, 1, 1), target=2.0).item()
        for m in (0.0, 2.0, 4.0)
    ]
    assert nats == pytest.approx([2.0, 0.0, 6.0])


def test_weighted_mse_counts_what_is_lit():
    x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)  # empty, full
    errors = torch.tensor([[0.1, 0.0], [0.0, 0.1]])
    empty, full = (losses.weighted_mse_term(x + e.view(1, 1, 1, 2), x, 9.0) for e in errors)
    torch.testing.assert_close(full, 10 * empty)
    torch.testing.assert_close(losses.weighted_mse_term(x + 0.1, x, 0.0), torch.tensor(0.01))


def test_ms_ssim():
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    assert [losses.ms_ssim_scales(size) for size in (16, 32, 64, 128, 256)] == [1, 2, 3, 4, 5]
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    torch.testing.assert_close(losses.ms_ssim_term(x, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    near, far = losses.ms_ssim_term(x + 0.02 * torch.randn_like(x), x), losses.ms_ssim_term(-x, x)
    assert 0 < near < 0.1 < far <= 1
    single = 1 - ssim(((x * 0.9) + 1) / 2, (x + 1) / 2, data_range=1.0)
    torch.testing.assert_close(losses.ms_ssim_term(x * 0.9, x), single, atol=0.02, rtol=0)


def test_effective_beta():
    assert losses.effective_beta(0.02, 128 * 128 * 3, 512, 1.0) == pytest.approx(1.92)
    # beta_effective of one is the textbook ELBO: sums of both terms weigh the same
    beta = 1 * 512 / (128 * 128 * 3)
    rec, divergence = torch.rand(4, 3, 128, 128), torch.rand(4, 8, 8, 8)
    ours = rec.mean() + beta * divergence.mean()
    textbook = (rec.sum() + losses.effective_beta(beta, 128 * 128 * 3, 512, 1.0) * divergence.sum()) / (
        4 * 3 * 128 * 128
    )
    torch.testing.assert_close(ours, textbook)


@pytest.mark.parametrize("active", [0, 3, 16])
def test_active_units_counts_those_that_vary(active):
    means = torch.zeros(100, 16)
    means[:, :active] = torch.randn(100, active)
    means[:, active:] = torch.randn(100, 16 - active) * 0.03 + 5
    assert active_units(means.reshape(100, 4, 2, 2)) == active


def test_psnr():
    x = torch.zeros(2, 1, 4, 4)
    torch.testing.assert_close(psnr(x + 0.2, x), torch.full((2,), 20.0))


def test_a_crop_of_lpips_reaches_one_square_another_at_each_step(tiny, random_backbone):
    lpips = {"net": "squeeze", "weights": str(random_backbone), "crop": 20}
    stage1 = {"data__image_size": 32, "stage1__model__latent_shape": [4, 8, 8], "stage1__lpips": lpips}
    settings = recipe.load(tiny(**stage1, stage1__loss_weights={"l1": 1.0, "lpips": 1.0}))
    stage = VAEStage(
        settings.stage1, settings.data, settings.seed, processes.make_accelerator(settings.stage1)
    )
    squares = set()
    for step in range(4):
        x_hat = torch.rand(2, 1, 32, 32, requires_grad=True)
        look = stage._perceptual(Rows(0, step, 0, 2, 2, torch.device("cpu")))
        losses.lpips_term(look, x_hat, torch.rand(2, 1, 32, 32), "repeat").backward()
        rows, columns = (x_hat.grad.abs().sum((0, 1)).sum(axis).nonzero().flatten() for axis in (1, 0))
        assert len(rows) <= 20 and rows[-1] - rows[0] < 20 and columns[-1] - columns[0] < 20
        squares.add((int(rows[0]), int(columns[0])))
    assert len(squares) > 1


@pytest.mark.parametrize("control", [{"free_bits": 0.004}, {"target": 0.0023}], ids=["a floor", "a target"])
def test_a_validation_does_not_depend_on_how_many_images_are_measured_at_once(tiny, control):
    """A floor or a target of the KL is no mean: that of the batches is not that of all images."""
    scores = []
    for batch_size in (2, 32):
        changes = {"stage1__batch_size": batch_size, "stage1__loss_weights": {"l1": 1.0, "kl": 1.0}}
        settings = recipe.load(tiny(**changes, stage1__kl_schedule=control))
        accelerator = processes.make_accelerator(settings.stage1)
        scores.append(
            VAEStage(settings.stage1, settings.data, settings.seed, accelerator).validate(lambda it: it)
        )
    few, many = scores
    assert few.keys() == many.keys()
    for key, value in few.items():
        assert float(value) == pytest.approx(float(many[key]), rel=1e-5, abs=1e-7), key


def test_a_crop_fits_the_images_and_the_network(tiny):
    for crop, message in ((33, "do not fit"), (12, "at least 20 px")):
        with pytest.raises(InputError, match=message):
            recipe.load(
                tiny(
                    data__image_size=32,
                    stage1__model__latent_shape=[4, 8, 8],
                    stage1__loss_weights={"lpips": 1.0, "kl": 0.1},
                    stage1__lpips={"net": "squeeze", "crop": crop},
                )
            )


@pytest.mark.parametrize("size", [11, 22, 43, 44, 87, 88, 98, 99, 175, 176])
def test_ms_ssim_has_as_many_scales_as_fit(size):
    """The library asks more of four scales than that they hold the window."""
    x = torch.rand(1, 1, size, 2 * size, generator=torch.Generator().manual_seed(0))
    assert losses.ms_ssim_term(x, x) == pytest.approx(0, abs=1e-5)
