"""Images as features, and how far two sets of them are from each other: FID, KID, precision and recall, IS.

A figure means nothing without the name of its extractor and the number of images, so both travel with it. The
Inception is for photographs; where ImageNet says nothing (speckle, jets, digits) a small network of the
data's own is taken. Dimension key: B batch, N images, C H W pixels in [-1, 1], F features, K classes.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from shared.config import InputError, say
from shared.disk import read_tensors, weights_file
from shared.measure import images
from shared.show.grids import on_white

PICTURES = (1, 3, 4)  # channels of what the Inception may be shown
SIDE = 32  # pixels to which images are shrunk before they are compared one by one

Features = tuple[torch.Tensor, torch.Tensor | None]  # features (N,F) and logits (N,K) or None


@dataclass
class Extractor:
    """`network` gives features (B,F) and logits (B,K) or None for pixels (B,C,H,W)."""

    name: str
    network: nn.Module

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor) -> Features:
        with torch.autocast(
            x.device.type, enabled=False
        ):  # as the metrics are defined, and equal in every command
            features, logits = self.network(x.float())
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    def all(self, x: torch.Tensor, device: torch.device, what: str) -> Features:
        """The same of pixels (N,C,H,W) of any number, 64 at a time, with a bar."""
        found = [self(part.to(device)) for part in tqdm(x.split(64), desc=f"features of {what}", leave=False)]
        return together(found)


def together(parts: Sequence[Features]) -> Features:
    """Features of several batches, in their order."""
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), None if logits[0] is None else torch.cat(logits)


@dataclass
class Seen:
    """What is kept of N images that were looked at: their pixels may be many GiB."""

    features: torch.Tensor  # (N,F)
    small: torch.Tensor  # shrunk, (N,D)
    logits: torch.Tensor | None = None  # (N,K)
    values: torch.Tensor | None = None  # (N,C,H,W) in the data's units, where statistics are asked for
    labels: torch.Tensor | None = None  # classes (N,), where there are some

    @property
    def found(self) -> Features:
        return self.features, self.logits

    def __len__(self) -> int:
        return len(self.features)


def look(
    extractor: Extractor,
    x: torch.Tensor,
    device: torch.device,
    values: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> Seen:
    """A batch of pixels (B,C,H,W), of values (B,C,H,W) where they are to be kept, and of classes (B,)."""
    found, logits = extractor(x.to(device))
    return Seen(found, shrunk(x).cpu(), logits, None if values is None else values.cpu(), labels)


class Kept:
    """What is kept of up to `count` images that are looked at batch by batch."""

    def __init__(self, count: int):
        self.count = count
        self.rows: dict[str, images.Rows] = {}

    def add(self, seen: Seen) -> None:
        for field in fields(Seen):
            batch = getattr(seen, field.name)
            if batch is not None:
                self.rows.setdefault(field.name, images.Rows(self.count)).add(batch)

    def all(self) -> Seen:
        return Seen(**{name: rows.all() for name, rows in self.rows.items()})


def joined(parts: Sequence[Seen], order: torch.Tensor) -> Seen:
    """What several processes have seen, in an order of all rows."""
    if len(parts) == 1:
        return parts[0]

    def all_of(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)[order]

    return Seen(**{field.name: all_of(field.name) for field in fields(Seen)})


class Inception(nn.Module):
    """The Inception that FID is defined by (TensorFlow's of 2015-12-05), by torch-fidelity.

    weights: of a local file; None for the library's download.
    """

    def __init__(self, weights: dict[str, torch.Tensor] | None):
        super().__init__()
        library = _library("feature_extractor_inceptionv3")
        self.logits = weights is None or "fc.weight" in weights
        layers = ["2048", "logits_unbiased"] if self.logits else ["2048"]
        if weights is None:
            self.network = library.FeatureExtractorInceptionV3("inception-v3-compat", layers)
        else:
            given = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
            given |= {name: weight.float() for name, weight in weights.items()}
            # The library reads pickles only: it is handed the tensors instead.
            with patch.object(library, "load_state_dict_from_url", lambda *_, **__: given):
                self.network = library.FeatureExtractorInceptionV3("inception-v3-compat", layers)

    def forward(self, x: torch.Tensor) -> Features:
        levels = ((on_white(x.clamp(-1, 1)) + 1) * 127.5).round().to(torch.uint8)
        features, *logits = self.network(levels.expand(-1, 3, -1, -1))
        return features, logits[0] if logits else None


class SmallNet(nn.Module):
    """Three strided convolutions; features: mean and deviation of the last maps over the image, F = 256."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        widths = [channels, 32, 64, 128]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.maps = nn.Sequential(*layers)
        self.head = nn.Linear(256, classes) if classes else None

    def forward(self, x: torch.Tensor) -> Features:
        maps = self.maps(x).flatten(2)
        features = torch.cat([maps.mean(2), maps.std(2, unbiased=False)], dim=1)  # (B,256)
        return features, None if self.head is None else self.head(features)


def inception(device: torch.device) -> Extractor:
    """Raises InputError where neither a local file nor the download is to be had."""
    file = weights_file("inception_fid")
    try:
        network = Inception(read_tensors(file) if file else None)
    except RuntimeError:
        raise InputError(f"{file}: not the weights of FID's Inception") from None
    except OSError as error:  # URLError among them
        raise InputError(
            f"FID: the Inception's weights could not be downloaded ({error}); put inception_fid.safetensors "
            "into a folder and name it in LATENT_STACK_WEIGHTS, or say --extractor own"
        ) from None
    return Extractor(
        "Inception 2015-12-05, 2048 features", network.to(device).to(memory_format=torch.channels_last).eval()
    )


def own(x: torch.Tensor, labels: torch.Tensor | None, device: torch.device, steps: int = 400) -> Extractor:
    """A network for data that ImageNet knows nothing of.

    It is the same every time for the same training images (N,C,H,W); on a GPU, whose sums have no order,
    nearly. With labels (N,) a small classifier of them; without, random convolutions, which tell
    distributions apart as well (Naeem et al. 2020, arXiv:2002.09797, section 4.2).
    """
    classes = 0 if labels is None else int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallNet(x.shape[1], classes).to(device)
        if labels is None:
            return Extractor("random convolutions, 256 features", network.eval())
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            loss = F.cross_entropy(network(x[rows].to(device))[1], labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    for tensor in network.state_dict().values():
        broadcast(tensor)  # features of several processes are compared: one network for all of them
    return Extractor(f"classifier of the {classes} classes, 256 features", network.eval())


def choose(
    kind: str,
    photographs: bool,
    channels: int,
    seen: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
    device: torch.device,
) -> Extractor:
    """The extractor that `kind` names.

    auto: the Inception for 8-bit images of 1, 3 or 4 channels (RGBA laid on white) where its weights can be
    had, else the data's own.

    Arguments:
        kind: auto, inception or own.
        photographs: whether the Inception has something to say of the images.
        channels: of the images.
        seen: gives training images (N,C,H,W) and labels (N,) for a network of the data's own.
        device: of the network.
    """
    _library("metric_fid")  # without it there are no distances, whichever network it is
    if kind == "own" or (kind == "auto" and not (photographs and channels in PICTURES)):
        return own(*seen(), device)
    if channels not in PICTURES or (channels == 4 and not photographs):
        reason = f"is for 1 or 3 channels and RGBA, the images have {channels}"
        raise InputError(f"--extractor inception: {reason}; say own")
    try:
        return inception(device)
    except InputError as error:
        if kind == "inception":
            raise
        say(f"note: {error}; taking a small network of the data's own instead")
        return own(*seen(), device)


# ---------------------------------------------------------------- distances between two sets


def _library(name: str) -> Any:
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    except ImportError:
        raise InputError("FID and its kin need torch-fidelity: pip install 'latent-stack[metrics]'") from None


def fid(generated: Features, real: Features) -> float:
    """Frechet distance of two results of an Extractor (Heusel et al. 2017, arXiv:1706.08500, equation 6)."""
    library = _library("metric_fid")
    ours = library.fid_features_to_statistics(generated[0].double())
    theirs = library.fid_features_to_statistics(real[0].double())
    return library.fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]


def distances(generated: Features, real: Features) -> dict[str, float]:
    """How far two results of an Extractor over all images are from each other.

    FID; KID with its deviation over 50 subsets; improved precision and recall (Kynkaanniemi et al. 2019,
    arXiv:1904.06991); the Inception Score where there are logits.
    """
    ours, logits = generated
    theirs, _ = real
    found = {"fid": fid(generated, real)}
    size = min(1000, len(ours) // 2, len(theirs) // 2)
    options = {"kid_subsets": 50, "kid_subset_size": size, "rng_seed": 0, "verbose": False}
    kid = _library("metric_kid").kid_features_to_metric(ours, theirs, **options)
    found["kid"] = kid["kernel_inception_distance_mean"]
    found["kid_deviation"] = kid["kernel_inception_distance_std"]
    # By a thousand rows: all distances between 10,000 images are 400 MB, and would be held four times.
    options = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    prc = _library("metric_prc").prc_features_to_metric(ours, theirs, **options)
    found["precision"] = prc["precision"]
    found["recall"] = prc["recall"]
    if logits is not None:
        score = _library("metric_isc").isc_features_to_metric(logits, splits=min(10, len(logits) // 4))
        found["inception_score"] = score["inception_score_mean"]
        found["inception_score_deviation"] = score["inception_score_std"]
    return found


def shrunk_size(height: int, width: int) -> tuple[int, int]:
    """The sides of a shrunk image."""
    return min(SIDE, height), min(SIDE, width)


def shrunk(x: torch.Tensor) -> torch.Tensor:
    """Images (N,C,H,W) as vectors of at most SIDE x SIDE pixels a channel."""
    return F.adaptive_avg_pool2d(x.float(), shrunk_size(*x.shape[-2:])).flatten(1)


def nearest(x: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest training image of each shrunk image.

    Arguments:
        x: shrunk images, (N,D).
        training: shrunk training images, (M,D).

    Returns:
        The distances, root mean square over pixels, (N,); the places among the training images, (N,).
    """
    found = [torch.cdist(part, training).min(dim=1) for part in x.split(64)]
    distance = torch.cat([f.values for f in found]) / training.shape[1] ** 0.5
    return distance, torch.cat([f.indices for f in found])
