"""The diffusers pipeline of this stack: noise -> sampler with guidance -> latents -> decoder -> values in the user's units.

The only way to sample. An exported pipeline folder carries copies of this file, of transforms.py and of the VAE's file,
so that it loads where this package is not installed. Where this package is, no code of the folder is run.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

import importlib
import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from .transforms import LatentCodec, ValueTransform

LOCAL = {"use_safetensors": True, "local_files_only": True}  # no pickle, no network
SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


@dataclass
class LatentDiffusionOutput:
    """`values`: (B,C,H,W) in the user's units; `pixels`: the same in [-1, 1]; `latents`: (B,c,h,w) as the decoder took them."""

    values: np.ndarray
    pixels: torch.Tensor
    latents: torch.Tensor

    @property
    def images(self) -> list:
        """The pixels as PIL images (grey, RGB or RGBA), as other diffusers pipelines return them."""
        return DiffusionPipeline.numpy_to_pil((self.pixels.float().cpu().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy())


class LatentDiffusionPipeline(DiffusionPipeline):
    """VAE, denoiser and scheduler, with the statistics of the latents and the value transform.

    Without a denoiser (a recipe with no stage 2) latents are drawn from the VAE's own prior, N(0, I). guide: the denoiser as
    it was early in its training, from which guidance leads away.
    """

    _optional_components = ["unet", "guide", "scheduler"]

    def __init__(
        self, vae, unet=None, scheduler=None, codec: dict | None = None, value_transform: dict | None = None, classes: list = (),
        guide=None, guidance_interval: list = (0.0, 1.0),
    ):  # fmt: skip
        super().__init__()
        self.register_modules(vae=vae, unet=unet, guide=guide, scheduler=scheduler)
        self.register_to_config(codec=codec, value_transform=value_transform)
        self.register_to_config(classes=list(classes), guidance_interval=list(guidance_interval))

    # ------------------------------------------------------------ sampling

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return tuple(self.vae.config.latent_shape)

    @staticmethod
    def noise(seed: int, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The noise of sample `index`: its own seed, drawn on the CPU, so that no batch, process or device changes it."""
        key = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(key >> np.uint64(1))))

    def noises(self, seed: int, count: int) -> torch.Tensor:
        """The noise (N,c,h,w) of samples 0..count-1 of a seed."""
        return torch.stack([self.noise(seed, i, self.latent_shape) for i in range(count)])

    @torch.no_grad()
    def __call__(
        self,
        noise: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 30,
        batch_size: int = 16,
        seed: int = 0,
    ) -> LatentDiffusionOutput:
        """Images for noise (B,c,h,w), or `batch_size` of them from a seed. labels: classes (B,), None for no class.

        guidance_scale w: the prediction is worse + w (own - worse), where the worse one is the guide's, if there is a guide
        (Karras et al. 2024, arXiv:2406.02507), else that for no class (Ho & Salimans 2022); 1 is no guidance. Outside of the
        pipeline's guidance_interval, noise levels in [0, 1], the prediction is its own (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        """
        if noise is None:
            noise = self.noises(seed, batch_size)
        z = self.sample(noise.to(self.device), labels, guidance_scale, num_inference_steps)
        pixels = self.vae.decode(z.to(self.vae.dtype)).sample  # (B,C,H,W)
        values = ValueTransform(**self.config.value_transform).inverse(pixels).cpu().numpy()
        return LatentDiffusionOutput(values=values, pixels=pixels, latents=z)

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float, num_steps: int) -> torch.Tensor:
        """Latents (B,c,h,w), as the decoder takes them, from noise (B,c,h,w)."""
        if self.unet is None:
            return noise
        own, guided = (self._guided(len(noise), labels, scale) for scale in (1.0, guidance_scale))
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            # equal steps from 1 to 0; left to itself the scheduler spends its last step between 0.001 and 0
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), device=noise.device)
        else:
            self.scheduler.set_timesteps(num_steps, device=noise.device)
        z, (low, high) = noise, self.config.guidance_interval
        times = self.scheduler.timesteps.tolist()  # fetched from the device once, not at every step
        for t, time in zip(self.progress_bar(self.scheduler.timesteps), times, strict=True):
            predict = guided if low <= time / self.scheduler.config.num_train_timesteps <= high else own
            z = self.scheduler.step(predict(z, t), t, z, return_dict=False)[0]
        return LatentCodec(**self.config.codec).to(z.device).decode(z)

    def _guided(self, count: int, labels: torch.Tensor | None, scale: float):
        """The denoiser as a function of (z_t, timestep), with guidance where the scale asks for it."""
        null = None
        if self.config.classes:
            null = torch.full((count,), len(self.config.classes), device=self.device)
        labels = null if labels is None else labels.to(self.device)
        if scale == 1.0 or (labels is null and not self.guide):
            return lambda z, t: self.unet(z, t, class_labels=labels).sample
        both = None if self.guide else torch.cat([null, labels])

        def guided(z, t):
            if self.guide:
                worse, own = (network(z, t, class_labels=labels).sample for network in (self.guide, self.unet))
            else:
                worse, own = self.unet(torch.cat([z, z]), t, class_labels=both).sample.chunk(2)
            return worse + scale * (own - worse)

        return guided

    # ------------------------------------------------------------ folders

    def save_pretrained(self, folder, **kwargs) -> None:
        """Write a folder that loads with this class, and with DiffusionPipeline and trust_remote_code elsewhere."""
        folder = Path(folder)
        super().save_pretrained(folder, **kwargs)
        here = Path(inspect.getfile(type(self)))
        shutil.copy(here, folder / "pipeline.py")
        shutil.copy(here.parent / "transforms.py", folder)
        shutil.copy(inspect.getfile(type(self.vae)), folder / "vae" / "model.py")
        for file in folder.rglob("*.json"):
            tree = json.loads(file.read_text())
            tree.pop("_name_or_path", None)  # where the part was loaded from is nobody else's business
            if file.name == "model_index.json":
                tree |= {"_class_name": ["pipeline", type(self).__name__], "vae": ["model", type(self.vae).__name__]}
            file.write_text(json.dumps(tree, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder):
        """A saved folder, its parts made by this package's and diffusers' own classes."""
        folder = Path(folder).resolve()
        index = json.loads((folder / "model_index.json").read_text())
        unet = guide = scheduler = None
        if index.get("guide", [None])[0]:
            guide = diffusers.UNet2DModel.from_pretrained(folder / "guide", **LOCAL)
        if index["unet"][0]:
            if (name := index["scheduler"][1]) not in SCHEDULERS:
                raise ValueError(f"{folder}: {name} is not a scheduler of this stack")
            unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", **LOCAL)
            scheduler = getattr(diffusers, name).from_pretrained(folder / "scheduler", local_files_only=True)
        config = {name: index[name] for name in ("codec", "value_transform", "classes", "guidance_interval") if name in index}
        return cls(_load_vae(folder / "vae"), unet, scheduler, **config, guide=guide)

    @classmethod
    def from_vae(cls, folder):
        """The VAE and value transform of a stage-1 checkpoint or a folder of latents; it samples the VAE's prior."""
        return cls(_load_vae(folder / "vae"), value_transform=ValueTransform.from_pretrained(folder / "value_transform").config)


def _load_vae(folder: Path):
    """Imported by name, so that a copy of this file can be read where the package is not installed."""
    return importlib.import_module("stage1_vae.model").DeepVAE.from_pretrained(folder.resolve(), **LOCAL)
