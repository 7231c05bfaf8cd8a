"""Restoring an image from a measurement of it, y = A x, with the denoiser as what is known of images.

Nothing is trained for it. At each step the latents that the denoiser expects are moved until what they decode
to agrees with the measurement, and are noised again: half-quadratic splitting (DiffPIR, Zhu et al. 2023,
arXiv:2305.08995, algorithm 1), with the decoder inside of A (as Rout et al. 2023, arXiv:2307.00619). A acts
on pixels in [-1, 1]. Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from .editing import Start, denoised, drawn_size, levels, start, values_of
from .transforms import LatentCodec, ValueTransform

RESTORE_STEPS = 5  # more were worse for photographs, measured in tests/benchmarks/restoration.py
TURNS, RATE = 40, 0.1  # of Adam in each step
NOISE = 0.025  # of a measurement, in pixels of [-1, 1]: it agrees when it is as near as that
PULL = 0.1  # towards what the denoiser expects

Operator = Callable[[torch.Tensor], torch.Tensor]


def downsampled(factor: int) -> Operator:
    """Means over squares of factor x factor pixels."""
    return lambda x: F.avg_pool2d(x, factor)


def blurred(sigma: float) -> Operator:
    """A Gaussian of a deviation of `sigma` pixels; the edge is repeated."""
    reach = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    weights = weights / weights.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        kernel = weights.to(x).expand(x.shape[1], 1, -1)
        x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
        x = F.conv2d(x, kernel[:, :, None], groups=x.shape[1])
        return F.conv2d(x, kernel[..., None], groups=x.shape[1])

    return blur


def seen(mask: torch.Tensor) -> Operator:
    """Pixels where a mask (H,W) or (1,1,H,W) of bool is true; zero elsewhere."""
    return lambda x: x * mask.to(x)


@dataclass
class Measured:
    """A measurement (B,...) of pixels in [-1, 1], and the operator that makes one of an image."""

    y: torch.Tensor
    operator: Operator
    mask = None  # nothing of the image is kept as it is

    def __len__(self) -> int:
        return len(self.y)

    def of(self, count: int) -> "Measured":
        """The same for a number of images. Raises ValueError where there are others."""
        if len(self.y) not in (1, count):
            raise ValueError(f"image: {len(self.y)} of them for {count} images to be drawn")
        return replace(self, y=self.y.expand(count, *self.y.shape[1:]))


def measured(pipe: Any, image: Any, operator: Operator) -> Measured:
    """Look at a measurement as a call gives it: as an image, but of the size that the operator makes.

    PIL images are fitted to that size. Raises ValueError where it does not fit the model.
    """
    transform = ValueTransform(**pipe.config.value_transform)
    if not {channel.kind for channel in transform.maps} <= {"range", "minmax"}:
        raise ValueError(
            "operator: acts on pixels, which are no multiples of these values (log1p, asinh, sqrt)"
        )
    if pipe.unet is None:
        raise ValueError("operator: this model has no denoiser to restore with")
    channels, side = drawn_size(pipe)
    try:
        wanted = operator(torch.zeros(1, channels, *side, device=pipe._execution_device)).shape[1:]
    except RuntimeError as error:
        raise ValueError(f"operator: nothing is left of {side[0]}x{side[1]} px ({error})") from None
    raw = values_of(image, transform, channels, wanted[1:])
    if raw.shape[1:] != wanted:
        raise ValueError(
            f"image: {tuple(raw.shape[1:])}; the operator makes {tuple(wanted)} of what is drawn"
        )
    return Measured(transform(raw).to(pipe._execution_device), operator)


def begun(
    pipe: Any, image: Any, mask: Any, strength: float | None, operator: Operator | None
) -> Start | Measured | None:
    """What a call begins from, if not from noise alone. Raises ValueError where it does not fit the model."""
    if image is None:
        return None
    return measured(pipe, image, operator) if operator else start(pipe, image, mask, strength)


@torch.no_grad()
def restore(
    pipe: Any,
    begin: Measured,
    noise: torch.Tensor,
    predict: Callable[[float], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    steps: int,
) -> torch.Tensor:
    """Normalised latents (B,c,h,w) whose images agree with a measurement.

    Arguments:
        pipe: the pipeline; of its scheduler only the path is read.
        begin: the measurement.
        noise: standard normal, (B,c,h,w): another one gives another answer that agrees as well.
        predict: the denoiser at a time, with its guidance.
        steps: from noise to latents.
    """
    scheduler, codec = pipe.scheduler, LatentCodec(**pipe.config.codec).to(noise.device)
    times = torch.linspace(1, 0, steps + 1).tolist()
    z = noise
    for t, after in zip(times, times[1:], strict=False):
        alpha, sigma = levels(scheduler, t)
        alpha_after, sigma_after = levels(scheduler, after)
        clean, _ = denoised(scheduler, z, t, predict(t))
        spread = sigma / (alpha**2 + sigma**2) ** 0.5  # of the clean latents that z_t leaves possible
        clean = _agreeing(pipe.vae, codec, clean, begin, PULL / spread**2)
        z = alpha_after * clean + sigma_after * (z - alpha * clean) / sigma
    return z


def _agreeing(
    vae: Any, codec: LatentCodec, expected: torch.Tensor, begin: Measured, pull: float
) -> torch.Tensor:
    """The latents near the expected ones whose image agrees with the measurement, by Adam."""
    z = expected.clone()
    with torch.enable_grad():
        z.requires_grad_()
        adam = torch.optim.Adam([z], lr=RATE, betas=(0.9, 0.99))
        for _ in range(TURNS):
            x = vae.decode(codec.decode(z).to(vae.dtype)).sample.float()
            # Both terms times NOISE^2: Adam does not mind, and the gradient stays within half precision.
            error = (begin.operator(x) - begin.y).square().sum() / 2
            error = error + NOISE**2 * pull / 2 * (z - expected).square().sum()
            adam.zero_grad()
            error.backward(inputs=[z])
            adam.step()
    return z.detach()
