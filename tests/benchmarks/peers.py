"""Other people's ways to the same end, each as its own documentation says, cut off by the clock.

Every peer trains on images x (N,1,32,32) in [-1, 1] for a number of seconds and returns a sampler: count,
steps -> pixels (count,1,32,32) in [-1, 1]. Imported one at a time, each in a process of its own; none of them
belongs to the package.
"""

import time

import torch


class Clock:
    """Counts a training's seconds and steps; `total` estimates how many steps the budget holds, for
    schedules."""

    def __init__(self, seconds: float):
        self.begun, self.seconds, self.steps = time.monotonic(), seconds, 0

    def running(self) -> bool:
        self.steps += 1
        return time.monotonic() - self.begun < self.seconds

    @property
    def total(self) -> int:
        share = max(1e-6, (time.monotonic() - self.begun) / self.seconds)
        return max(1, round(self.steps / share))


def batches(x: torch.Tensor, size: int):
    """Endless shuffled batches."""
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def diffusers_ddpm(x: torch.Tensor, seconds: float, device):
    """Hugging Face's unconditional_image_generation: UNet2DModel on pixels, epsilon, AdamW 1e-4 (0.95,
    0.999), weight decay 1e-6, 500 steps of warm-up, EMA of power 3/4; its six levels (128 ... 512) cut to
    four for 32 px."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    model = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    clock, data = Clock(seconds), batches(x, 16)
    while clock.running():
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, clock.steps / 500)
        images = next(data).to(device)
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),), device=device)
        loss = torch.nn.functional.mse_loss(model(scheduler.add_noise(images, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    ema.copy_to(model.parameters())
    fast = DDIMScheduler.from_config(scheduler.config)

    @torch.inference_mode()
    def sample(count: int, steps: int) -> torch.Tensor:
        chosen = scheduler if steps == 1000 else fast
        chosen.set_timesteps(steps)
        z = torch.randn(count, 1, 32, 32, device=device)
        for t in chosen.timesteps:
            z = chosen.step(model(z, t).sample, t, z).prev_sample
        return z

    return sample, clock.steps, sum(p.numel() for p in model.parameters())


def denoising_diffusion_pytorch(x: torch.Tensor, seconds: float, device):
    """lucidrains' Unet(64, (1, 2, 4, 8)) and GaussianDiffusion with its Trainer's choices: 16 images twice
    accumulated, Adam 8e-5 (0.9, 0.99), EMA 0.995 every 10 steps, DDIM."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=1, flash_attn=False)
    diffusion = GaussianDiffusion(model, image_size=32, timesteps=1000, sampling_timesteps=50).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    clock, data = Clock(seconds), batches((x + 1) / 2, 16)
    while clock.running():
        for _ in range(2):
            (diffusion(next(data).to(device)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    @torch.inference_mode()
    def sample(count: int, steps: int) -> torch.Tensor:
        averaged = ema.ema_model
        averaged.sampling_timesteps, averaged.is_ddim_sampling = steps, steps < 1000
        return averaged.sample(batch_size=count) * 2 - 1

    return sample, clock.steps, sum(p.numel() for p in model.parameters())


def monai_latent_diffusion(x: torch.Tensor, seconds: float, device):
    """MONAI's 2d_ldm tutorial: AutoencoderKL (L1 + 1e-6 KL, Adam 1e-4), then DiffusionModelUNet on latents
    scaled by 1/std (Adam 1e-4), batches of 64; widths halved for 32 px; a third of the time for the first.
    Its perceptual term needs a download and its discriminator begins after ten epochs, which the budget does
    not reach: both are left out."""
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

    vae = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(64, 64, 128),
        latent_channels=3,
        num_res_blocks=2,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4)
    clock, data = Clock(seconds / 3), batches((x + 1) / 2, 64)
    while clock.running():
        images = next(data).to(device)
        reconstruction, mean, sigma = vae(images)
        kl = 0.5 * (mean.square() + sigma.square() - sigma.square().log() - 1).sum((1, 2, 3)).mean()
        loss = torch.nn.functional.l1_loss(reconstruction, images) + 1e-6 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first = clock.steps
    vae.eval()
    unet = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=2,
        channels=(64, 128, 256),
        attention_levels=(False, True, True),
        num_head_channels=(0, 128, 256),
    ).to(device)
    schedule = {"schedule": "linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
    scheduler, fast = (
        DDPMScheduler(num_train_timesteps=1000, **schedule),
        DDIMScheduler(num_train_timesteps=1000, **schedule),
    )
    with torch.no_grad():
        scale = 1 / vae.encode_stage_2_inputs(next(data).to(device)).std()
    inferer = LatentDiffusionInferer(scheduler, scale_factor=scale)
    optimizer, clock = torch.optim.Adam(unet.parameters(), lr=1e-4), Clock(seconds * 2 / 3)
    while clock.running():
        images = next(data).to(device)
        noise = torch.randn(len(images), 3, 8, 8, device=device)
        t = torch.randint(0, 1000, (len(images),), device=device)
        prediction = inferer(
            inputs=images, diffusion_model=unet, noise=noise, timesteps=t, autoencoder_model=vae
        )
        loss = torch.nn.functional.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def sample(count: int, steps: int) -> torch.Tensor:
        chosen = scheduler if steps == 1000 else fast
        chosen.set_timesteps(steps)
        noise = torch.randn(count, 3, 8, 8, device=device)
        found = inferer.sample(
            input_noise=noise, diffusion_model=unet, scheduler=chosen, autoencoder_model=vae, verbose=False
        )
        return found * 2 - 1

    return sample, first + clock.steps, sum(p.numel() for m in (vae, unet) for p in m.parameters())


PEERS = {
    "diffusers_ddpm": diffusers_ddpm,
    "denoising_diffusion_pytorch": denoising_diffusion_pytorch,
    "monai": monai_latent_diffusion,
}
