"""What is asked of a pipeline: samples of some classes, shared out over processes; a way between two of them.

Does not depend on networks, nor on runs. Dimension key: N images, C H W pixels, c h w latents.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from shared.config import InputError, say
from shared.sampling import editing
from shared.sampling.pipeline import LatentDiffusionPipeline, Predict
from shared.sampling.restoring import Operator, downsampled
from shared.sampling.transforms import LatentCodec

TRACED = 50  # steps from an image to its noise, and back


class Noises:
    """The noise (c,h,w) of each of `count` samples of a seed, made when it is asked for."""

    def __init__(self, pipe: LatentDiffusionPipeline, seed: int, count: int):
        self.pipe = pipe
        self.seed = seed
        self.rows = range(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Of some samples, (N,c,h,w)."""
        shape = self.pipe.latent_shape
        return torch.stack([self.pipe.noise(self.seed, row, shape) for row in self.rows[rows]])


def great_circle(a: torch.Tensor, b: torch.Tensor, count: int) -> torch.Tensor:
    """The way between two noises on which noise keeps its length (spherical interpolation, Shoemake 1985).

    With the angle w between a and b: (sin((1 - s) w) a + sin(s w) b) / sin w, s from 0 to 1.

    Arguments:
        a, b: standard normal, (c,h,w).
        count: the number of points N, both ends among them.

    Returns:
        (N,c,h,w).
    """
    angle = torch.arccos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1)).clamp_min(1e-4)
    weights = torch.linspace(0, 1, count, device=a.device).view(-1, 1, 1, 1)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


def way(
    pipe: LatentDiffusionPipeline,
    ends: Sequence[str],
    count: int,
    label: str | None,
    guidance_scale: float,
    num_steps: int,
    batch_size: int,
    state: PartialState | Any,
) -> torch.Tensor:
    """Pixels (N,C,H,W) from the sample of one seed, or from one's own image, to another.

    Raises InputError where an image cannot be read, or does not fit the model.
    """
    if not all(end.isdecimal() for end in ends):
        return between_images(pipe, ends, count, label, batch_size)
    noise, labels = between(pipe, int(ends[0]), int(ends[1]), count, label)
    return gathered(drawn(pipe, noise, labels, guidance_scale, num_steps, batch_size, state))[1]


def between(
    pipe: LatentDiffusionPipeline, first: int, last: int, count: int, label: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Noise (N,c,h,w) from that of one seed to that of another, and one class for all (N,): the first unless
    said."""
    a, b = (pipe.noise(seed, 0, pipe.latent_shape) for seed in (first, last))
    return great_circle(a, b, count), _one_class(pipe, label, count)


def _one_class(pipe: LatentDiffusionPipeline, label: str | None, count: int) -> torch.Tensor | None:
    classes = pipe.config.classes
    return choose_labels(label or (classes or [None])[0], classes, count)


def between_images(
    pipe: LatentDiffusionPipeline, files: Sequence[str], count: int, label: str | None, batch_size: int
) -> torch.Tensor:
    """Pixels (N,C,H,W) from one's own image to another one, of one class or of none.

    Both are followed back to the noise that they would be drawn from, and what lies between these is drawn.

    Raises:
        InputError: where a file cannot be read, or does not fit the model.
    """
    try:
        ends = torch.cat([editing.start(pipe, _read(file, "--interpolate"), None, 1.0).z for file in files])
    except ValueError as error:
        raise InputError(f"--interpolate: {error}") from None
    if len(ends) != 2:
        raise InputError(f"--interpolate: {' and '.join(files)} hold {len(ends)} images; one in each")
    own = None if label is None else _one_class(pipe, label, count)
    noise = editing.invert(pipe, ends, pipe.predictor(2, None if own is None else own[:2], 1.0), TRACED)
    way = great_circle(noise[0], noise[1], count)
    shares = torch.linspace(0, 1, count, device=ends.device).view(-1, 1, 1, 1)
    begins = (1 - shares) * ends[0] + shares * ends[1]
    codec = LatentCodec(**pipe.config.codec).to(ends.device)
    parts = []
    for start in tqdm(range(0, count, batch_size), desc="interpolating", unit="batch"):
        rows = slice(start, start + batch_size)
        predict = pipe.predictor(len(way[rows]), None if own is None else own[rows], 1.0)
        begin = editing.Start(begins[rows], begins[rows], begins[rows], 1.0)
        z = editing.redraw(pipe, begin, way[rows], _always(predict), TRACED)
        parts.append(pipe.decode_latents(codec.decode(z)).cpu())
    return torch.cat(parts)


def _always(predict: Predict) -> Callable[[float], Predict]:
    """The same denoiser at any time."""
    return lambda t: predict


def choose_labels(label: str | None, classes: Sequence[str], count: int) -> torch.Tensor | None:
    """Classes (count,): the one asked for, or all in turn; None where there are none. Raises InputError."""
    if label is None:
        return torch.arange(count) % len(classes) if classes else None
    if not classes:
        raise InputError(f"--label {label}: this model was trained without classes")
    if label in classes:
        return torch.full((count,), list(classes).index(label))
    if label.isdecimal() and int(label) < len(classes):
        return torch.full((count,), int(label))
    found = f"{', '.join(classes)} (or 0 to {len(classes) - 1})"
    raise InputError(f"--label: no class {label!r}; there are {found}")


def labels_like(seen: torch.Tensor | None, classes: Sequence[str], count: int) -> torch.Tensor | None:
    """Classes (count,) as frequent as in the training images (N,), to compare samples with real images."""
    if seen is None or not classes:
        return choose_labels(None, classes, count)
    return seen[torch.linspace(0, len(seen) - 1, count).long()]


def drawn(
    pipe: LatentDiffusionPipeline,
    noise: torch.Tensor | Noises,
    labels: torch.Tensor | None,
    guidance_scale: float,
    num_steps: int,
    batch_size: int,
    state: PartialState | Any,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Samples for noise (N,c,h,w) and classes (N,), by whole batches; each process draws every n-th.

    Yields:
        The first row, values and pixels (B,C,H,W) of a batch of this process.
    """
    pipe.set_progress_bar_config(disable=True)
    for rows in _shared_out(len(noise), batch_size, state, "sampling"):
        seen = None if labels is None else labels[rows]
        z = pipe.sample(noise[rows].to(pipe.device), seen, guidance_scale, num_steps)
        pixels = pipe.decode_latents(z)
        yield rows.start, torch.from_numpy(pipe.values(pixels)), pixels.cpu()


def _shared_out(count: int, batch_size: int, state: PartialState | Any, what: str) -> Iterator[slice]:
    """The rows of every n-th batch, for the n-th process, and a bar that shows all of them."""
    starts = range(0, count, batch_size)
    with tqdm(total=count, unit="img", desc=what, disable=not state.is_main_process) as bar:
        for start in starts[state.process_index :: state.num_processes]:
            yield slice(start, start + batch_size)
            bar.update(min(batch_size * state.num_processes, count - bar.n))


def gathered(
    parts: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and pixels (N,C,H,W) of what all processes have drawn, in the order of the samples."""
    ordered = sorted(gather_object(list(parts)), key=lambda part: part[0])
    return torch.cat([values for _, values, _ in ordered]), torch.cat([pixels for _, _, pixels in ordered])


def read_edit(
    image: str, mask: str | None, strength: float | None, upscale: int | None, num_steps: int | None
) -> dict[str, Any]:
    """The arguments of a call that begins from files; num_steps None: as many as an edit takes.

    Raises InputError where a file cannot be read.
    """
    found = {"image": _read(image, "--image"), "strength": strength, "num_inference_steps": num_steps}
    found |= {"operator": downsampled(upscale)} if upscale else {}
    return found | ({"mask_image": _read(mask, "--mask")} if mask else {})


def _read(file: str, flag: str) -> Any:
    """A picture, or the array of an .npy."""
    try:
        if Path(file).suffix == ".npy":
            return np.load(file, allow_pickle=False)
        with Image.open(file) as picture:
            return picture.copy()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # A broken PNG is a SyntaxError.
        raise InputError(f"{flag}: {file} cannot be read ({' '.join(str(error).split())})") from None


def edited(
    pipe: LatentDiffusionPipeline,
    edit: Mapping[str, Any],
    seed: int,
    count: int,
    labels: torch.Tensor | None,
    guidance_scale: float,
    batch_size: int,
    state: PartialState | Any,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """An image that is changed, once for each sample of a seed, by whole batches as `drawn` gives them.

    Raises InputError where it does not fit the model.
    """
    pipe.set_progress_bar_config(disable=True)
    noise = Noises(pipe, seed, count)
    image = edit["image"]
    several = isinstance(image, np.ndarray) and image.ndim == 4 and len(image) > 1
    if several and len(image) != count:
        raise InputError(f"--image: holds {len(image)} images: --num-images {len(image)} changes each once")
    if "operator" in edit:
        _note_shrunk(pipe, image, edit["operator"])
    for rows in _shared_out(count, batch_size, state, "editing"):
        edit = {**edit, "image": image[rows] if several else image}
        try:
            key = editing.generators(seed, range(count)[rows])
            seen = None if labels is None else labels[rows]
            given: dict[str, Any] = {
                "latents": noise[rows],
                "generator": key,
                "guidance_scale": guidance_scale,
            }
            out: Any = pipe(seen, **given, **edit)
        except ValueError as error:
            raise InputError(str(error)) from None
        yield rows.start, torch.from_numpy(out.values), out.pixels.cpu()


def _note_shrunk(pipe: LatentDiffusionPipeline, image: Any, operator: Operator) -> None:
    """Of a picture that is larger than what it shall be enlarged from, details are made up anew."""
    channels, side = editing.drawn_size(pipe)
    try:
        height, width = operator(torch.zeros(1, channels, *side)).shape[2:]
    except RuntimeError:
        return  # nothing is left of it, as the call will say
    if isinstance(image, Image.Image) and image.height > height and image.width > width:
        size = f"{image.height}x{image.width} px is shrunk to {height}x{width}"
        say(f"note: --image: {size}, to be drawn anew in {side[0]}x{side[1]}, which is what this model draws")
