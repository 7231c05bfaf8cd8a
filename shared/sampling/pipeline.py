"""The diffusers pipeline of this stack: noise -> sampler with guidance -> latents -> decoder -> values.

The only way to sample; folders.py is how a pipeline is saved and read. Dimension key: B batch, N images, C
image channels, H W pixels, c h w latents.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from .calls import Labels, LatentDiffusionOutput, as_images, check, class_numbers, counted, label_ids
from .editing import EDIT_STEPS, Start, generators, keyed, redraw
from .folders import SavedPipeline
from .restoring import RESTORE_STEPS, Measured, Operator, begun, restore
from .transforms import LatentCodec, ValueTransform

FIRST_FORMAT = {"num_inference_steps": 30, "guidance_scale": 1.0}  # of an export that does not say

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LatentDiffusionPipeline(SavedPipeline):
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
        sampling: num_inference_steps and guidance_scale of a call that says nothing else, and
            unconditional_guide: whether the guide is told no class.
    """

    model_cpu_offload_seq = "guide->unet->vae"
    _optional_components = ["unet", "guide", "scheduler"]
    _callback_tensor_inputs = ["latents"]

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
        sampling: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, guide=guide, scheduler=scheduler)
        self.register_to_config(codec=codec, value_transform=value_transform, sampling=sampling)
        self.register_to_config(classes=list(classes), guidance_interval=list(guidance_interval))
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    # ------------------------------------------------------------ what a call is asked for

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return tuple(self.vae.config.latent_shape)

    @property
    def id2label(self) -> dict[int, str]:
        """The names of the classes by number."""
        return dict(enumerate(self.config.classes))

    @property
    def guidance_scale(self) -> float:
        """That of the call that runs; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`: the steps that are left are not taken."""
        return self._interrupt

    def get_label_ids(self, labels: str | Sequence[str]) -> list[int]:
        """The numbers of classes that are named. Raises ValueError for a name that is none."""
        return label_ids(labels, self.config.classes)

    @staticmethod
    def noise(seed: int, index: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Noise of sample `index`, from its own seed, on the CPU: no batch, process or device changes it."""
        return torch.randn(shape, generator=keyed(seed, index))

    def noises(self, seed: int, count: int) -> torch.Tensor:
        """The noise (N,c,h,w) of samples 0..count-1 of a seed."""
        return torch.stack([self.noise(seed, index, self.latent_shape) for index in range(count)])

    def prepare_latents(
        self, count: int, generator: Any = None, latents: torch.Tensor | None = None, seed: int | None = None
    ) -> torch.Tensor:
        """Standard normal noise (B,c,h,w), float32: the latents given, those of a seed, or a generator's."""
        device = self._execution_device
        if latents is not None:
            wanted = (count, *self.latent_shape)
            if tuple(latents.shape) != wanted:
                raise ValueError(f"latents: {tuple(latents.shape)}; {count} images begin from {wanted}")
            return latents.to(device, torch.float32)
        if seed is not None:
            return self.noises(seed, count).to(device)
        return randn_tensor((count, *self.latent_shape), generator, device, torch.float32)

    # ------------------------------------------------------------ sampling

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_end: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        operator: Operator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        batch_size: int | None = None,
        noise: torch.Tensor | None = None,
        labels: Labels | None = None,
    ) -> LatentDiffusionOutput | tuple:
        """Images, one for each class label and num_images_per_prompt. Raises ValueError for what is wrong.

        Arguments:
            class_labels: a number, a name, a list of them or a tensor (B,); None for no class.
            num_images_per_prompt: images of each label.
            generator: of the noise; a list: one for each image.
            latents, seed: the noise (B,c,h,w) itself, or that of `noises`, which no batch or device changes.
            num_inference_steps, guidance_scale: None: as the recipe sampled; 1 is no guidance.
            guidance_start, guidance_end: times between which guidance acts, 0 data and 1 noise.
            image, mask_image, strength: an image to begin from, as in editing.start.
            operator: of which the image is a measurement, to be restored; of restoring.py, or your own.
            output_type: pil, np (B,H,W,C) and pt (B,C,H,W) in [0, 1], or latent.
            callback_on_step_end: called as (pipe, step, timestep, tensors); the latents it returns are taken.
            batch_size, noise, labels: as calls were before: seed is 0 unless given.
        """
        latents = noise if latents is None else latents
        begin = begun(self, image, mask_image, strength, operator)
        steps, scale = self._defaults(num_inference_steps, guidance_scale)
        if begin and num_inference_steps is None:
            steps = RESTORE_STEPS if operator else max(steps, EDIT_STEPS)
        check(output_type, steps, callback_on_step_end_tensor_inputs)
        numbers = class_numbers(labels if class_labels is None else class_labels, self.config.classes)
        given = counted(begin, latents, generator)
        count, numbers = self._count(numbers, given, num_images_per_prompt, batch_size)
        if seed is None and generator is None and batch_size is not None:
            seed = 0  # as calls by batch_size always were
        z = self.prepare_latents(count, generator, latents, seed)
        interval = self._interval(guidance_start, guidance_end)
        if begin:
            begin = begin.of(count)
            z = self._edit(z, begin, numbers, scale, steps, interval, seed, generator)
        else:
            tell = (callback_on_step_end, callback_on_step_end_tensor_inputs)
            z = self.sample(z, numbers, scale, steps, interval, generator, tell)
        found = self._output(z, output_type, begin)
        return found if return_dict else (found.images,)

    def _edit(
        self,
        noise: torch.Tensor,
        begin: Start | Measured,
        labels: torch.Tensor | None,
        scale: float,
        steps: int,
        interval: Sequence[float],
        seed: int | None,
        generator: Any,
    ) -> torch.Tensor:
        """Latents (B,c,h,w), as the decoder takes them, of an image that is changed."""
        plain, guided = (self.predictor(len(noise), labels, one) for one in (1.0, scale))
        if seed is not None and generator is None:
            generator = generators(seed, range(len(noise)))

        def at(t: float) -> Predict:
            return guided if interval[0] <= t <= interval[1] else plain

        if isinstance(begin, Measured):
            z = restore(self, begin, noise, at, steps)
        else:
            z = redraw(self, begin, noise, at, steps, generator)
        return LatentCodec(**self.config.codec).to(z.device).decode(z)

    def _output(self, z: torch.Tensor, output_type: str, begin: Any = None) -> LatentDiffusionOutput:
        """What a call gives, of latents (B,c,h,w); outside of a mask the image as it was."""
        if output_type == "latent":
            found = LatentDiffusionOutput(images=z, latents=z)
        else:
            pixels = self.decode_latents(z)
            values = self.values(pixels)
            if begin and begin.mask is not None:
                pixels = torch.where(begin.mask, pixels, begin.pixels.to(pixels.dtype))
                values = np.where(begin.mask.cpu(), values, begin.raw.numpy()).astype(values.dtype)
            images = as_images(pixels, output_type, values.dtype == np.uint8)
            found = LatentDiffusionOutput(images=images, values=values, pixels=pixels, latents=z)
        self.maybe_free_model_hooks()
        return found

    def _defaults(self, num_steps: int | None, scale: float | None) -> tuple[int, float]:
        """The steps and the scale of a call: its own, or the recipe's."""
        said = self.config.get("sampling") or FIRST_FORMAT
        steps = said["num_inference_steps"] if num_steps is None else num_steps
        return int(steps), float(said["guidance_scale"] if scale is None else scale)

    def _interval(self, start: float | None, end: float | None) -> tuple[float, float]:
        low, high = self.config.guidance_interval
        return low if start is None else start, high if end is None else end

    def _count(
        self, labels: torch.Tensor | None, given: Any, each: int, batch_size: int | None
    ) -> tuple[int, torch.Tensor | None]:
        """How many images, and the class of each: as many as latents, images or generators, or labels."""
        count = (batch_size or 1) * each if given is None else len(given)
        if labels is None:
            return count, None
        labels = labels.repeat_interleave(count if len(labels) == 1 else each)
        return len(labels), labels

    @torch.no_grad()
    def sample(
        self,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        guidance_scale: float,
        num_steps: int,
        interval: Sequence[float] | None = None,
        generator: Any = None,
        tell: tuple[Callable[..., dict] | None, Sequence[str]] = (None, ()),
    ) -> torch.Tensor:
        """Latents (B,c,h,w), as the decoder takes them, from noise (B,c,h,w); the rest as in a call."""
        if self.unet is None:
            return noise
        self._guidance_scale, self._interrupt = guidance_scale, False
        callback, tensors = tell
        low, high = interval or self.config.guidance_interval
        plain = self.predictor(len(noise), labels, 1.0)
        guided = self.predictor(len(noise), labels, guidance_scale)
        self._set_timesteps(num_steps, noise.device)
        times = self.scheduler.timesteps.tolist()  # fetched from the device once, not at every step
        self._num_timesteps = len(times)
        takes = inspect.signature(self.scheduler.step).parameters
        draws = {"generator": generator} if "generator" in takes else {}
        scale_input = getattr(self.scheduler, "scale_model_input", lambda z, t: z)
        z = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for index, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                break
            within = low <= times[index] / self.scheduler.config.num_train_timesteps <= high
            if self._guidance_scale != guidance_scale:  # a callback has changed it
                guidance_scale = self._guidance_scale
                guided = self.predictor(len(z), labels, guidance_scale)
            predict = guided if within else plain
            z = self.scheduler.step(predict(scale_input(z, t), t), t, z, return_dict=False, **draws)[0]
            if callback:
                answer = callback(self, index, t, {"latents": z} if "latents" in tensors else {})
                z = (answer or {}).get("latents", z)
        return LatentCodec(**self.config.codec).to(z.device).decode(z)

    @torch.no_grad()
    def decode_latents(self, z: torch.Tensor) -> torch.Tensor:
        """Pixels (B,C,H,W) in [-1, 1] of latents (B,c,h,w)."""
        return self.vae.decode(z.to(self.vae.dtype)).sample

    def values(self, pixels: torch.Tensor) -> np.ndarray:
        """Pixels (B,C,H,W) in the user's units."""
        return ValueTransform(**self.config.value_transform).inverse(pixels).cpu().numpy()

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
        guide's, if there is a guide (for no class, if it is unconditional), else the denoiser's for no
        class. Outside of guidance_interval `sample` takes D_1 alone.

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
            null = torch.full((count,), len(self.config.classes), device=self._execution_device)
        own = null if labels is None else labels.to(self._execution_device)
        told = null if (self.config.get("sampling") or {}).get("unconditional_guide") else own

        def plain(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return _answer(self.unet, z, t, own)

        def away_from_the_guide(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            worse = _answer(self.guide, z, t, told)
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


def _answer(network: Any, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """A prediction in the network's own precision; guidance and the latents between steps are float32."""
    return network(z.to(getattr(network, "dtype", z.dtype)), t, class_labels=labels).sample.float()
