"""What a call of the pipeline is given, checked, and what it gives.

What is wrong raises ValueError, as in pipelines of diffusers: one line that names the argument.
Dimension key: B batch, C image channels, H W pixels, c h w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

Labels = int | str | Sequence[int | str] | np.ndarray | torch.Tensor
OUTPUTS = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents",)


def label_ids(names: str | Sequence[str], classes: Sequence[str]) -> list[int]:
    """The numbers of classes that are named."""
    known = {name: number for number, name in enumerate(classes)}
    named = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"class_labels: no class {unknown[0]!r}; there are {', '.join(known) or 'none'}")
    return [known[name] for name in named]


def class_numbers(labels: Labels | None, classes: Sequence[str]) -> torch.Tensor | None:
    """Class numbers (B,) of numbers, names, an array or a tensor; None for none."""
    if labels is None:
        return None
    if isinstance(labels, (np.ndarray, np.generic)):
        labels = labels.tolist()
    if isinstance(labels, torch.Tensor):
        numbers = labels.reshape(-1)
    else:
        listed = [labels] if isinstance(labels, (int, str)) else list(labels)
        ids = [label_ids(one, classes)[0] if isinstance(one, str) else one for one in listed]
        numbers = torch.tensor(ids, dtype=torch.long)
    if not numbers.numel():
        return None
    if not classes:
        raise ValueError("class_labels: this model was trained without classes")
    if numbers.min() < 0 or numbers.max() > len(classes):  # the number after the last is "no class"
        raise ValueError(f"class_labels: {numbers.tolist()}; classes go from 0 to {len(classes) - 1}")
    return numbers


def check(output_type: str, num_steps: int, tensors: Sequence[str]) -> None:
    """Words that have few values, and the number of steps."""
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type: {', '.join(OUTPUTS)}, not {output_type!r}")
    if num_steps < 1:
        raise ValueError(f"num_inference_steps: at least 1, not {num_steps}")
    other = [name for name in tensors if name not in CALLBACK_TENSORS]
    if other:
        raise ValueError(f"callback_on_step_end_tensor_inputs: {other[0]!r} is none of {CALLBACK_TENSORS}")


def counted(begin: Any, latents: torch.Tensor | None, generator: Any) -> Any:
    """What says by its length how many images are wanted: images, latents or generators; or None."""
    several = isinstance(generator, list) and len(generator) > 1
    given = generator if latents is None and several else latents
    return begin if begin and len(begin) > 1 else given


# ---------------------------------------------------------------- what it gives


@dataclass
class LatentDiffusionOutput(BaseOutput):
    """What a call gives.

    `images` as output_type asks; `values` (B,C,H,W) in the user's units; `pixels`, the same in [-1, 1];
    `latents` (B,c,h,w), as the decoder takes them.
    """

    images: Any = None
    values: Any = None  # beside the dict's method of that name, which nobody needs of an output
    pixels: Any = None
    latents: Any = None


def as_images(pixels: torch.Tensor, output_type: str, grey_levels: bool) -> Any:
    """Pixels (B,C,H,W) in [-1, 1] as pil, np or pt; what Pillow has no mode for stays an array.

    grey_levels: whether these are pictures; four channels of a field are no RGBA.
    """
    levels = pixels.float().cpu().clamp(-1, 1) / 2 + 0.5
    if output_type == "pt":
        return levels
    array = levels.permute(0, 2, 3, 1).numpy()
    if output_type == "np" or array.shape[-1] not in ((1, 3, 4) if grey_levels else (1, 3)):
        return array
    return DiffusionPipeline.numpy_to_pil(array)
