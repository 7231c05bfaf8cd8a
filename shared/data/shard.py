"""One shard of saved latents: written whole, mapped, and summed for the statistics of its cache.

Dimension key: N images, c h w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shared import disk
from shared.config import InputError

ROUNDING = 0.0025  # of a posterior's variance, which keeping its mean in half precision may add
KINDS = ((torch.float16, 4), (torch.float32, 4), (torch.int64, 1))  # types and axes of moments and labels


def write(path: Path, moments: torch.Tensor, labels: torch.Tensor | None) -> None:
    """One shard, whole or not at all; in half precision where rounding is lost in the posterior's noise."""
    half, single = moments.half(), moments.float()
    added = (half - single).chunk(2, dim=1)[0].square() * (-single.chunk(2, dim=1)[1]).exp()
    tensors = {"moments": (half if added.mean() <= ROUNDING else single).contiguous()}
    if labels is not None:
        tensors["label"] = labels
    disk.write_file(path, lambda temporary: save_file(tensors, temporary))


def mapped(path: Path, name: str) -> torch.Tensor:
    """A tensor of a safetensors file, memory-mapped: nothing is read before it is used, no file stays open.

    Raises InputError where the file is missing, cut short or no shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable shard of latents ({reason})") from None
    if (tensor.dtype, tensor.ndim) not in KINDS:
        raise InputError(f"{path}: not a readable shard of latents ({name} is {tensor.dtype})")
    return tensor


def is_whole(path: Path, images: int) -> bool:
    """Whether an earlier, interrupted run left this shard complete (it is renamed into place only then)."""
    try:
        return len(mapped(path, "moments")) == images
    except InputError:
        return False


@dataclass
class Summary:
    """What the manifest needs of a shard: its line, and the sums that statistics are made of."""

    entry: dict[str, Any]  # size and sha256
    count: int
    first: torch.Tensor  # of E[z], (c,h,w), double
    second: torch.Tensor  # of E[z^2], (c,h,w), double


def summarise(path: Path) -> Summary:
    """Read a shard that was just written, by the process that wrote it: the disk's cache still has it."""
    moments = mapped(path, "moments")
    channels, height, width = moments.shape[1:]
    first = torch.zeros(channels // 2, height, width, dtype=torch.float64)
    second = torch.zeros_like(first)
    for block in moments.split(256):
        mean, logvar = block.double().chunk(2, dim=1)
        first += mean.sum(0)
        second += (mean.square() + logvar.exp()).sum(0)
    return Summary(disk.entries(path.parent, [path])[path.name], len(moments), first, second)


def statistics(summaries: Sequence[Summary], per_element: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of z ~ q(z|x) over all images, in double precision.

    By the law of total variance Var(z) = Var_x(mean) + E_x[sigma^2] = E[mean^2 + sigma^2] - E[mean]^2.

    Arguments:
        summaries: of the shards, in their order.
        per_element: one number per element instead of one per channel.

    Returns:
        Mean and deviation, each (c,1,1) or, per element, (c,h,w).
    """
    count = sum(summary.count for summary in summaries)
    first = torch.stack([summary.first for summary in summaries]).sum(0) / count
    second = torch.stack([summary.second for summary in summaries]).sum(0) / count
    if not per_element:
        first, second = (part.mean((1, 2), keepdim=True) for part in (first, second))
    return first, (second - first.square()).clamp_min(1e-12).sqrt()
