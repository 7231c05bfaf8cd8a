"""Paths, targets, samplers and guidance: laws, with diffusers as the oracle."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from shared import recipe
from shared.data import latents
from shared.sampling.config import SAMPLERS
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler
from shared.training import processes
from shared.training.keyed import generator
from stage2_diffusion import diffusion
from stage2_diffusion.config import Stage2Config, TimeConfig, UNetConfig
from stage2_diffusion.stage import DiffusionStage
from stage2_diffusion.unet import make_unet

Z, NOISE = torch.randn(2, 6, 4, 8, 8)
T = torch.tensor([0.001, 0.2, 0.4, 0.6, 0.8, 0.999])


def test_flow_is_a_straight_line():
    z_t, target, timesteps = diffusion.Flow().noised(Z, NOISE, T)
    torch.testing.assert_close(timesteps, T * 1000)
    at = T.view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t - at * target, Z)  # back along the velocity lies the data
    torch.testing.assert_close(z_t + (1 - at) * target, NOISE)  # and ahead the noise


def test_flow_is_diffusers_flow():
    oracle = FlowMatchEulerDiscreteScheduler(1000, shift=1.0)
    timesteps = oracle.timesteps[[100, 500, 900]]
    expected = oracle.scale_noise(Z[:3], timesteps, NOISE[:3])
    torch.testing.assert_close(diffusion.Flow().noised(Z[:3], NOISE[:3], timesteps / 1000)[0], expected)


@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_ddpm_is_diffusers_ddpm(objective):
    oracle = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    z_t, target, steps = diffusion.DDPM(objective).noised(Z, NOISE, T)
    torch.testing.assert_close(z_t, oracle.add_noise(Z, NOISE, steps))
    torch.testing.assert_close(
        target, NOISE if objective == "epsilon" else oracle.get_velocity(Z, NOISE, steps)
    )
    assert steps.min() >= 0 and steps.max() <= 999


def test_times():
    normal = torch.randn(200_000)
    uniform = diffusion.draw_times(TimeConfig(kind="uniform"), normal)
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.001
    t = diffusion.draw_times(TimeConfig(mean=0.5, std=0.7), normal)
    torch.testing.assert_close(torch.logit(t).mean(), torch.tensor(0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.logit(t).std(), torch.tensor(0.7), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("objective", "kind"), [("flow", "logit_normal"), ("v", "uniform"), ("epsilon", "uniform")]
)
def test_times_follow_the_objective_unless_said(objective, kind):
    assert Stage2Config(max_steps=1, objective=objective).times.kind == kind
    said = Stage2Config(max_steps=1, objective=objective, time=TimeConfig(kind="logit_normal", mean=1.0))
    assert said.times == said.time


def test_labels_are_dropped_at_their_rate():
    labels = torch.arange(10).repeat(10_000)
    dropped = diffusion.drop_labels(labels, torch.rand(len(labels)), 0.1, null_label=10)
    kept = dropped != 10
    assert abs(kept.float().mean() - 0.9) < 0.01 and torch.equal(dropped[kept], labels[kept])
    assert torch.equal(diffusion.drop_labels(labels, torch.rand(len(labels)), 0.0, 10), labels)


def test_denoising_error_is_per_latent():
    torch.testing.assert_close(diffusion.denoising_error(Z, NOISE), (Z - NOISE).square().flatten(1).mean(1))


ALPHA_BARS = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod


class Exact(torch.nn.Module):
    """The network that knows the data: z ~ N(m, s^2). Its answer is the conditional expectation of the
    target."""

    def __init__(self, objective, mean, std, error):
        super().__init__()
        self.objective, self.mean, self.std, self.error = objective, mean, std, error

    def forward(self, z_t, timestep, class_labels=None):
        if self.objective == "flow":
            t = timestep / 1000
            a, b = 1 - t, t
        else:
            alpha_bar = ALPHA_BARS[timestep.long()]
            a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        gain = (z_t - a * self.mean) / (a**2 * self.std**2 + b**2)
        z, noise = self.mean + a * self.std**2 * gain, b * gain * (1 + self.error)
        out = {"flow": noise - z, "epsilon": noise, "v": a * noise - b * z}[self.objective]
        return type("Output", (), {"sample": out})


def exact_pipeline(objective, sampler, error, shift=1.0):
    """Samples N(2, 0.5^2) by a network that knows it, but for an error."""
    pipe = LatentDiffusionPipeline.__new__(LatentDiffusionPipeline)
    pipe.unet, pipe.guide, pipe.scheduler = (
        Exact(objective, 2.0, 0.5, error),
        None,
        make_scheduler(objective, sampler, shift),
    )
    config = {"classes": [], "codec": {"mean": [[[0.0]]], "std": [[[1.0]]]}, "guidance_interval": [0.0, 1.0]}
    pipe._internal_dict = type("C", (dict,), {"__getattr__": dict.get})(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("objective", "sampler"), [(o, s) for o, samplers in SAMPLERS.items() for s in samplers]
)
@pytest.mark.parametrize("error", [0.0, 0.01])
def test_every_sampler_draws_the_data_from_an_exact_network(objective, sampler, error):
    """And from one whose noise is 1 % too long: no step of a sampler may blow an error up.

    It begins where the path ends, which on DDPM's schedule is not quite noise.
    """
    left = 0.0 if objective == "flow" else ALPHA_BARS[-1]  # of the data's variance
    end = left**0.5 * 2 + (left * 0.5**2 + 1 - left) ** 0.5 * torch.randn(
        2000, 4, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    z = exact_pipeline(objective, sampler, error).sample(end, None, 1.0, 50)
    assert abs(z.mean() - 2) < 0.03 and abs(z.std() - 0.5) < 0.05


def test_dpmpp_needs_a_fraction_of_eulers_evaluations():
    """On the flow, a second-order solver with 8 evaluations is nearer to where the path ends than Euler with
    24."""
    noise = torch.randn(200, 4, 4, 4)
    end = 2 + 0.5 * noise  # the path of a Gaussian is straight in this sense: the same quantile at both ends

    def error(sampler: str, evaluations: int) -> float:
        return (exact_pipeline("flow", sampler, 0.0).sample(noise, None, 1.0, evaluations) - end).abs().mean()

    assert error("dpmpp", 8) < error("euler", 24)


def test_one_euler_step_per_network_evaluation():
    scheduler = make_scheduler("flow", "euler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0] and scheduler.timesteps.tolist() == [
        1000,
        750,
        500,
        250,
    ]


@pytest.mark.parametrize("sampler", SAMPLERS["flow"])
def test_shifted_steps_lie_nearer_to_noise_on_the_same_path(sampler):
    """Times t become s t / (1 + (s - 1) t), and an exact network still draws the data."""
    noise = torch.randn(2000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    even, shifted = (exact_pipeline("flow", sampler, 0.0, shift) for shift in (1.0, 2.0))
    even.sample(noise[:1], None, 1.0, 50)
    z = shifted.sample(noise, None, 1.0, 50)
    assert abs(z.mean() - 2) < 0.03 and abs(z.std() - 0.5) < 0.05
    t = even.scheduler.sigmas
    assert torch.allclose(shifted.scheduler.sigmas, 2 * t / (1 + t), atol=2.5e-3)


def test_unet_has_a_null_label():
    unet = make_unet(UNetConfig(channels=[16, 32], attention_levels=[1], head_dim=8), (4, 8, 8), 10)
    assert unet.config.num_class_embeds == 11 and unet.config.down_block_types == (
        "DownBlock2D",
        "AttnDownBlock2D",
    )
    out = unet(Z, T * 1000, class_labels=torch.full((6,), 10)).sample
    assert out.shape == Z.shape
    assert (
        make_unet(
            UNetConfig(channels=[16, 24], attention_levels=[], head_dim=8), (4, 8, 8), 0
        ).config.num_class_embeds
        is None
    )


@torch.no_grad()
def test_a_validation_is_of_held_out_latents_by_the_averaged_weights(tiny, trained):
    chosen, cache = recipe.load(tiny()), latents.open_cache(trained / "latents")
    decoder = LatentDiffusionPipeline.from_vae(trained / "latents")
    accelerator = processes.make_accelerator(chosen.stage2)
    stage = DiffusionStage(chosen.stage2, chosen.sampling, chosen.seed, cache, decoder, accelerator)
    for weight in stage.models["unet"].parameters():  # those in training
        weight.fill_(float("nan"))
    part = cache.split("val").__getitems__(range(6))
    noise = torch.randn(2, 6, 4, 4, 4, generator=generator(chosen.seed, "validation"))
    z = stage.codec.sample(part["moments"], noise[0])
    z_t, target, at = stage.path.noised(z, noise[1], torch.full((6,), 0.5))
    found = stage.emas["unet"].module(z_t, at, class_labels=part["label"]).sample
    expected = diffusion.denoising_error(found, target).mean()
    torch.testing.assert_close(stage.validate(iter)["val/t0.5"], expected)


def test_a_validation_takes_no_more_latents_at_once_than_a_training_step(tiny, trained):
    """What fits into the memory of a step fits into that of a validation, and its numbers stay the same."""
    cache = latents.open_cache(trained / "latents")
    found = []
    for parts in (1, 4):
        chosen = recipe.load(tiny(stage2__grad_accumulation=parts))
        accelerator = processes.make_accelerator(chosen.stage2)
        decoder = LatentDiffusionPipeline.from_vae(trained / "latents")
        stage = DiffusionStage(chosen.stage2, chosen.sampling, chosen.seed, cache, decoder, accelerator)
        sizes = []
        stage.emas["unet"].module.register_forward_pre_hook(
            lambda _, inputs, seen=sizes: seen.append(len(inputs[0]))
        )
        found.append(stage.validate(iter))
        stage.preview()
        assert max(sizes) == 8 // parts
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
