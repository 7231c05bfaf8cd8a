"""The diffusers pipeline of this stack: noise -> sampler with guidance -> latents -> decoder -> values.

The only way to sample. An exported pipeline folder carries copies of this file, of transforms.py and of the
VAE's file, so that it loads where this package is not installed. Where this package is, no code of the folder
is run. Dimension key: B batch, N images, C image channels, H W pixels, c h w latents.
"""

import importlib
import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from .transforms import LatentCodec, ValueTransform

LOCAL = {"use_safetensors": True, "local_files_only": True}  # no pickle, no network
CONSTANTS = ("codec", "value_transform", "classes", "guidance_interval")  # what stands in model_index.json

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class LatentDiffusionOutput:
    """`values` (B,C,H,W) in the user's units; `pixels`, the same in [-1, 1]; `latents` (B,c,h,w), decoded."""

    values: np.ndarray
    pixels: torch.Tensor
    latents: torch.Tensor

    @property
    def images(self) -> list:
        """The pixels as PIL images (grey, RGB or RGBA), as other diffusers pipelines return them."""
        levels = self.pixels.float().cpu().clamp(-1, 1) / 2 + 0.5
        return DiffusionPipeline.numpy_to_pil(levels.permute(0, 2, 3, 1).numpy())


class LatentDiffusionPipeline(DiffusionPipeline):
    """VAE, denoiser and scheduler, with the statistics of the latents and the value transform.

    Without a denoiser (a recipe with no stage 2) latents are drawn from the VAE's own prior, N(0, I).

    Arguments:
        vae: a model with encode, decode and config.latent_shape.
        unet: the denoiser.
        scheduler: a diffusers scheduler on the path that the denoiser was trained on.
        codec: the arguments of LatentCodec.
        value_transform: the arguments of ValueTransform.
        classes: names of the classes, which the denoiser knows by number; the number after the last is "no
            class".
        guide: the denoiser as it was early in its training, from which guidance leads away.
        guidance_interval: times [low, high], 0 data and 1 noise, between which guidance acts.
    """

    _optional_components = ["unet", "guide", "scheduler"]

    def __init__(
        self,
        vae: Any,
        unet: Any = None,
        scheduler: Any = None,
        codec: dict | None = None,
        value_transform: dict | None = None,
        classes: Sequence[str] = (),
        guide: Any = None,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ):
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
        """Noise of sample `index`, from its own seed, on the CPU: no batch, process or device changes it."""
        key = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(key >> np.uint64(1))))

    def noises(self, seed: int, count: int) -> torch.Tensor:
        """The noise (N,c,h,w) of samples 0..count-1 of a seed."""
        return torch.stack([self.noise(seed, index, self.latent_shape) for index in range(count)])

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
        """Images for noise, or `batch_size` of them from a seed.

        Arguments:
            noise: standard normal, (B,c,h,w).
            labels: classes (B,); None for no class.
            guidance_scale: w in `guided`; 1 is no guidance.
            num_inference_steps: steps of the scheduler.
            batch_size, seed: read where no noise is given.
        """
        if noise is None:
            noise = self.noises(seed, batch_size)
        z = self.sample(noise.to(self.device), labels, guidance_scale, num_inference_steps)
        pixels = self.vae.decode(z.to(self.vae.dtype)).sample  # (B,C,H,W)
        values = ValueTransform(**self.config.value_transform).inverse(pixels).cpu().numpy()
        return LatentDiffusionOutput(values=values, pixels=pixels, latents=z)

    @torch.no_grad()
    def sample(
        self, noise: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float, num_steps: int
    ) -> torch.Tensor:
        """Latents (B,c,h,w), as the decoder takes them, from noise (B,c,h,w)."""
        if self.unet is None:
            return noise
        plain = self.predictor(len(noise), labels, 1.0)
        guided = self.predictor(len(noise), labels, guidance_scale)
        low, high = self.config.guidance_interval
        self._set_timesteps(num_steps, noise.device)
        times = self.scheduler.timesteps.tolist()  # fetched from the device once, not at every step
        z = noise
        for t, time in zip(self.progress_bar(self.scheduler.timesteps), times, strict=True):
            within = low <= time / self.scheduler.config.num_train_timesteps <= high
            predict = guided if within else plain
            z = self.scheduler.step(predict(z, t), t, z, return_dict=False)[0]
        return LatentCodec(**self.config.codec).to(z.device).decode(z)

    def _set_timesteps(self, num_steps: int, device: torch.device) -> None:
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            # equal steps from 1 to 0; left to itself the scheduler spends its last step between 0.001 and 0
            sigmas = np.linspace(1, 1 / num_steps, num_steps).tolist()
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_steps, device=device)

    def predictor(self, count: int, labels: torch.Tensor | None, scale: float) -> Predict:
        """The denoiser as a function of (z_t, timestep), with guidance where the scale asks for it.

        D_w = D_0 + w (D_1 - D_0), where D_1 is the denoiser's own prediction and D_0 a worse one: the
        guide's, if there is a guide, else the denoiser's for no class. Outside of guidance_interval `sample`
        takes D_1 alone.

        Arguments:
            count: B.
            labels: classes (B,); None for no class.
            scale: w; 1 is no guidance.

        References:
            Ho & Salimans 2022, arXiv:2207.12598, equation 6.
            Karras et al. 2024, arXiv:2406.02507, section 4 (the guide).
            Kynkaanniemi et al. 2024, arXiv:2404.07724 (the interval).
        """
        null = None
        if self.config.classes:
            null = torch.full((count,), len(self.config.classes), device=self.device)
        own = null if labels is None else labels.to(self.device)

        def plain(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return _answer(self.unet, z, t, own)

        def away_from_the_guide(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            worse = _answer(self.guide, z, t, own)
            return worse + scale * (plain(z, t) - worse)

        def away_from_no_class(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            both = torch.cat([null, own])  # type: ignore[list-item]  # neither is None here
            worse, better = _answer(self.unet, torch.cat([z, z]), t, both).chunk(2)
            return worse + scale * (better - worse)

        if scale == 1.0:
            return plain
        if self.guide:
            return away_from_the_guide
        return plain if own is null else away_from_no_class

    # ------------------------------------------------------------ folders

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write a folder that this class loads, and elsewhere DiffusionPipeline with trusted remote code."""
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
                tree["_class_name"] = ["pipeline", type(self).__name__]
                tree["vae"] = ["model", type(self.vae).__name__]
            file.write_text(json.dumps(tree, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None
    ) -> "LatentDiffusionPipeline":
        """A saved folder, its parts made by this package's and diffusers' own classes.

        torch_dtype: of the networks; None: as they were saved.
        """
        folder = Path(folder).resolve()
        index = json.loads((folder / "model_index.json").read_text())
        parts: dict[str, Any] = {}
        for name in ("unet", "guide"):
            if index.get(name, [None])[0]:
                load = diffusers.UNet2DModel.from_pretrained
                parts[name] = load(folder / name, torch_dtype=torch_dtype, **LOCAL)
        if "unet" in parts:
            scheduler = _scheduler_class(index["scheduler"][1])
            parts["scheduler"] = scheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        constants = {name: index[name] for name in CONSTANTS if name in index}
        return cls(_load_vae(folder / "vae", torch_dtype), **parts, **constants)

    @classmethod
    def from_vae(cls, folder: Path, torch_dtype: torch.dtype | None = None) -> "LatentDiffusionPipeline":
        """The VAE and value transform of a stage-1 checkpoint or latents folder; samples the VAE's prior."""
        transform = ValueTransform.from_pretrained(folder / "value_transform")
        return cls(_load_vae(folder / "vae", torch_dtype), value_transform=transform.config)


def _answer(network: Any, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """A prediction in the network's own precision; guidance and the latents between steps are float32."""
    return network(z.to(getattr(network, "dtype", z.dtype)), t, class_labels=labels).sample.float()


def _scheduler_class(name: str) -> Any:
    """A scheduler of diffusers by its name, and nothing else of diffusers. Raises ValueError."""
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"{name} is not a scheduler of diffusers")
    return found


def vae_class(folder: Path) -> Any:
    """The class of a saved VAE: DeepVAE, or PretrainedVAE around a network of diffusers.

    Imported by name, so that a copy of this file can be read where the package is not installed.
    """
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = "DeepVAE"  # whose loading says what is wrong with the folder
    model = importlib.import_module("stage1_vae.model")
    return model.PretrainedVAE if name == "PretrainedVAE" else model.DeepVAE


def _load_vae(folder: Path, torch_dtype: torch.dtype | None = None) -> Any:
    return vae_class(folder).from_pretrained(folder.resolve(), torch_dtype=torch_dtype, **LOCAL)
