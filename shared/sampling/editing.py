"""Drawing that begins from an image of one's own: image to image, and painting into a mask.

An edit follows the denoiser's path by first-order steps, whatever the scheduler: DDIM without noise (Song et
al. 2021, arXiv:2010.02502, equation 12), which on the straight path of flow matching is Euler's step. A mask
is kept as in RePaint (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1): what is known is noised to the
level of each step, and each step is gone over again.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch.nn import functional as F

from .transforms import MODES, LatentCodec, ValueTransform, picture_parts, picture_planes

EDIT_STEPS = 20  # of an edit at least, where a call does not say
TURNS = 4  # how often each step is gone over where a mask is painted into


@dataclass
class Start:
    """What an edit begins from.

    Arguments:
        raw: the images in the user's units, (B,C,H,W).
        pixels: the same in [-1, 1].
        z: their normalised latents, (B,c,h,w).
        strength: the time to which they are noised: 0 keeps them, 1 leaves nothing of them.
        mask: pixels to be drawn anew, (B,1,H,W) of bool; None: all.
        cells: latents to be drawn anew, (B,1,h,w) of bool; None: all.
    """

    raw: torch.Tensor
    pixels: torch.Tensor
    z: torch.Tensor
    strength: float
    mask: torch.Tensor | None = None
    cells: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.z)

    def of(self, count: int) -> "Start":
        """The same for a number of images: one becomes many. Raises ValueError where there are others."""
        if len(self.z) not in (1, count):
            raise ValueError(f"image: {len(self.z)} of them for {count} images to be drawn")
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        many: dict[str, Any] = {key: value.expand(count, -1, -1, -1) for key, value in tensors.items()}
        return self if len(self.z) == count else replace(self, **many)


@torch.no_grad()
def start(pipe: Any, image: Any, mask: Any, strength: float | None) -> Start:
    """Look at an image, a mask and a strength as a call gives them.

    Raises ValueError where they do not fit the model.

    Arguments:
        pipe: the pipeline.
        image: PIL images; an array (C,H,W) or (B,C,H,W) in the user's units; a tensor (C,H,W) or (B,C,H,W)
            in [0, 1]; or a list.
        mask: bright where something new is wanted: PIL images, an array or a tensor (H,W) or (B,1,H,W).
        strength: None: 1 with a mask, else 0.6.
    """
    if strength is None:
        strength = 1.0 if mask is not None else 0.6
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: between 0 (the image) and 1 (a new one), not {strength}")
    if pipe.unet is None:
        raise ValueError("image: this model has no denoiser to change it with")
    transform, device = ValueTransform(**pipe.config.value_transform), pipe._execution_device
    raw = _raw(pipe, image, transform).cpu()
    pixels = transform(raw).to(device)
    moments = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode().float()
    codec = LatentCodec(**pipe.config.codec).to(device)
    found = Start(raw, pixels, (moments - codec.mean) / codec.std, strength)
    if mask is not None:
        found.mask = _mask(mask, found.pixels)
        if min(found.z.shape[2:]) < 2:
            raise ValueError("mask_image: these latents have no places (a linear head): nothing can be kept")
        found.cells = F.adaptive_max_pool2d(found.mask.float(), found.z.shape[2:]) > 0
    return found


def _raw(pipe: Any, image: Any, transform: ValueTransform) -> torch.Tensor:
    """Images in the user's units, (B,C,H,W), of the size that the model draws."""
    channels, side = drawn_size(pipe)
    raw = values_of(image, transform, channels, side)
    if tuple(raw.shape[1:]) != (channels, *side):
        raise ValueError(f"image: {tuple(raw.shape[1:])}; this model draws {(channels, *side)}")
    return raw


def drawn_size(pipe: Any) -> tuple[int, list[int]]:
    """The channels of the images that a pipeline draws, and their height and width."""
    config = pipe.vae.config
    side = config.sample_size
    return config.out_channels, [side, side] if isinstance(side, int) else list(side)


def values_of(image: Any, transform: ValueTransform, channels: int, side: Sequence[int]) -> torch.Tensor:
    """PIL images, arrays or a tensor (B,C,H,W) as values in the user's units, (B,C,H,W).

    Pictures are fitted to a size [height, width]. To a model of arrays a picture shows values as its samples
    are shown: black is the low end of their range, white the high one.
    """
    if isinstance(image, (list, tuple)) and image and isinstance(image[0], (np.ndarray, torch.Tensor)):
        image = np.stack(image) if isinstance(image[0], np.ndarray) else torch.stack(list(image))
    if isinstance(image, torch.Tensor):
        return transform.inverse((image if image.ndim == 4 else image[None]).float() * 2 - 1)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"image: an array of {image.dtype}; numbers are wanted")
        if not np.isfinite(image).all():
            raise ValueError("image: values that are not finite (NaN or infinite)")
        return torch.from_numpy(image if image.ndim == 4 else image[None])
    pictures = [image] if isinstance(image, Image.Image) else list(image)
    if channels not in (MODES if transform.integer else (1, 3)):
        raise ValueError(f"image: a model of {channels} channels begins from arrays (C,H,W) in its units")
    levels = torch.from_numpy(np.stack([_levels(one, channels, side) for one in pictures]))
    return levels if transform.integer else transform.inverse(levels.float() / 127.5 - 1)


def _levels(image: Image.Image, channels: int, side: Sequence[int]) -> np.ndarray:
    """A picture as grey levels 0..255, (C,H,W): its middle in the model's size."""
    size = (side[1], side[0])
    parts = picture_parts(image, channels)
    fitted = picture_planes([ImageOps.fit(part, size, Image.Resampling.BICUBIC) for part in parts])
    return fitted.clip(0, 255)  # of 16 bits edges overshoot


def _grey(mask: Image.Image) -> Image.Image:
    """A mask's levels 0..255, upright; where it is transparent, what it shows there."""
    if mask.mode.startswith("I;16"):
        return picture_parts(mask, 1)[0]
    return ImageOps.exif_transpose(mask).convert("L")


def _mask(mask: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Where something new is wanted, (B,1,H,W) of bool."""
    count, _, height, width = pixels.shape
    if isinstance(mask, (torch.Tensor, np.ndarray)):
        found = torch.as_tensor(mask) > 0.5
    else:
        pictures = [mask] if isinstance(mask, Image.Image) else list(mask)
        grey = [_grey(one) for one in pictures]
        fitted = [ImageOps.fit(one, (width, height), Image.Resampling.NEAREST) for one in grey]
        found = torch.from_numpy(np.stack([np.asarray(one) for one in fitted])[:, None] > 127)
    found = found[(None,) * (4 - found.ndim)]
    if tuple(found.shape[1:]) != (1, height, width) or len(found) not in (1, count):
        wanted = f"{(1, height, width)}, one for all or one for each"
        raise ValueError(f"mask_image: {len(found)} of {tuple(found.shape[1:])}; the images want {wanted}")
    return found.expand(count, -1, -1, -1).to(pixels.device)


# ---------------------------------------------------------------- the path


def keyed(*key: int) -> torch.Generator:
    """A generator on the CPU for a seed, the number of a sample and so on: no other key has its numbers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def generators(seed: int, rows: Sequence[int]) -> list[torch.Generator]:
    """Of the noise by which the samples of a seed are gone over again: no batch changes them."""
    return [keyed(seed, row, 1) for row in rows]


def levels(scheduler: Any, t: float) -> tuple[float, float]:
    """alpha and sigma of z_t = alpha z + sigma noise at a time, 0 data and 1 noise."""
    if _is_flow(scheduler):
        return 1 - t, t
    if t <= 0:
        return 1.0, 0.0
    step = min(int(t * len(scheduler.alphas_cumprod)), len(scheduler.alphas_cumprod) - 1)
    kept = float(scheduler.alphas_cumprod[step])
    return kept**0.5, (1 - kept) ** 0.5


def _is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def split(
    scheduler: Any, z: torch.Tensor, answer: torch.Tensor, alpha: float, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and the noise that z_t is made of, by what the denoiser answers."""
    if _is_flow(scheduler):  # the velocity, noise - z
        return z - sigma * answer, z + alpha * answer
    if scheduler.config.prediction_type == "v_prediction":  # alpha noise - sigma z
        return alpha * z - sigma * answer, sigma * z + alpha * answer
    return (z - sigma * answer) / alpha, answer


def denoised(
    scheduler: Any, z: torch.Tensor, t: float, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and the noise that the denoiser takes z_t (B,c,h,w) of a time apart into."""
    timestep = torch.tensor(t * scheduler.config.num_train_timesteps, device=z.device)
    return split(scheduler, z, predict(z, timestep), *levels(scheduler, t))


@torch.no_grad()
def redraw(
    pipe: Any,
    begin: Start,
    noise: torch.Tensor,
    predict: Callable[[float], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    steps: int,
    generator: Any = None,
) -> torch.Tensor:
    """Normalised latents (B,c,h,w), from an image noised to the time `begin.strength`.

    Arguments:
        pipe: the pipeline; of its scheduler only the path is read.
        begin: where to begin, and what to keep.
        noise: standard normal, (B,c,h,w).
        predict: the denoiser at a time, with its guidance.
        steps: from that time to 0.
        generator: of the noise by which a step is gone over again; a list: one for each image.
    """
    scheduler = pipe.scheduler
    times = torch.linspace(begin.strength, 0, steps + 1).tolist()
    alpha, sigma = levels(scheduler, times[0])
    z = alpha * begin.z + sigma * noise
    if not begin.strength:
        return z
    turns = 1 if begin.cells is None else TURNS
    for t, after in zip(times, times[1:], strict=False):
        alpha, sigma = levels(scheduler, t)
        alpha_after, sigma_after = levels(scheduler, after)
        for turn in range(turns):
            clean, rest = denoised(scheduler, z, t, predict(t))
            later = alpha_after * clean + sigma_after * rest
            if begin.cells is not None:
                later = torch.where(begin.cells, later, alpha_after * begin.z + sigma_after * noise)
            if turn + 1 < turns and after > 0:
                ratio = alpha / alpha_after
                fresh = randn_tensor(z.shape, generator, z.device, z.dtype)
                z = ratio * later + max(sigma**2 - (ratio * sigma_after) ** 2, 0.0) ** 0.5 * fresh
        z = later
    return z


@torch.no_grad()
def invert(
    pipe: Any,
    z: torch.Tensor,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """The noise (B,c,h,w) that `redraw` makes normalised latents (B,c,h,w) of: the same path, gone backwards.

    DDIM inversion (Song et al. 2021, arXiv:2010.02502, section 4.3).
    """
    scheduler, begin = pipe.scheduler, z
    times = torch.linspace(0, 1, steps + 1).tolist()
    for t, after in zip(times, times[1:], strict=False):
        clean, rest = denoised(scheduler, z, t, predict)
        alpha, sigma = levels(scheduler, after)
        z = alpha * clean + sigma * rest
    alpha, sigma = levels(scheduler, 1.0)
    return (z - alpha * begin) / sigma  # redraw adds what of the image is left at its first step
