"""A run's images -> saved latents, by the averaged weights of its newest stage-1 checkpoint.

Each process encodes whole shards, so that an interrupted run goes on to the same bytes with any number of
processes. Dimension key: N images, c h w latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from shared import config
from shared.data import latents, shard, sources, splits
from shared.data.augment import Copies
from shared.data.batches import Batches, in_parts
from shared.data.config import DataConfig
from shared.sampling.transforms import ValueTransform
from shared.training import checkpoint
from shared.training.processes import on_first_process
from stage1_vae.pretrained import load_vae

BATCH = 64  # images encoded at once


def encode(checkpoints: Path, images: Path, folder: Path, data: DataConfig, accelerator: Accelerator) -> None:
    """Encode both splits of the images into a folder; a finished one of the same VAE and images is kept.

    Raises InputError where there is no checkpoint yet, the images are not those that it was trained on
    (`images` tells), or the folder holds other latents.
    """
    newest = checkpoint.required(checkpoints)
    source = sources.open_source(data)
    training, held_out = splits.split(source, data)
    identities = {"train": splits.identity(training, data), "val": splits.identity(held_out, data)}
    splits.check_images(images, identities["train"], data)
    parts: dict[str, Batches] = {"train": training, "val": held_out}
    if data.augment.copies > 1:
        identities["train"] |= asdict(data.augment)
        parts["train"] = Copies(training, data.augment)
    wanted = latents.fingerprint(newest, identities)
    latents.refuse_if_stale(folder, wanted)
    if latents.read_manifest(folder):
        config.say(f"{folder}: up to date")
        return
    on_first_process(accelerator, lambda: latents.begin(folder, wanted))
    vae = load_vae(newest / "vae").to(accelerator.device).eval()
    transform = ValueTransform.from_pretrained(newest / "value_transform")
    plan = latents.planned(folder, {name: len(part) for name, part in parts.items()})
    summaries = write_shards(vae, transform, parts, plan, accelerator)
    manifest = on_first_process(
        accelerator,
        lambda: latents.finish(folder, newest, by_element(vae), source.names, plan, summaries),
    )
    count = sum(map(len, parts.values()))
    config.say(f"{folder}: {count:,} latents of {len(manifest['classes']) or 'no'} classes")


def by_element(vae: Any) -> bool:
    """Whether each latent has statistics of its own: behind a linear head a channel's are not alike."""
    return vae.config.get("head") == "linear"


def write_shards(
    vae: Any,
    transform: ValueTransform,
    parts: dict[str, Batches],
    plan: latents.Plan,
    accelerator: Accelerator,
) -> dict[Path, shard.Summary]:
    """Write this process's shards that are not there yet; returns the summaries of all processes' shards."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    shares = {name: entries[rank::processes] for name, entries in plan.items()}
    mine = [entry for share in shares.values() for entry in share]
    total = sum(len(rows) for _, rows in mine)
    summaries: list[tuple[Path, shard.Summary]] = []
    with tqdm(total=total, unit="img", desc="encoding", disable=not accelerator.is_main_process) as bar:
        for name, share in shares.items():
            missing = [(path, rows) for path, rows in share if not shard.is_whole(path, len(rows))]
            bar.update(sum(len(rows) for _, rows in share) - sum(len(rows) for _, rows in missing))
            ranges = [rows for _, rows in missing]
            encoded = encode_rows(vae, transform, parts[name], ranges, accelerator, bar)
            for (path, _), (moments, labels) in zip(missing, encoded, strict=True):
                shard.write(path, moments, labels)
            summaries += [(path, shard.summarise(path)) for path, _ in share]
    return dict(gather_object(summaries))


def encode_rows(
    vae: Any,
    transform: ValueTransform,
    part: Batches,
    shards: Sequence[range],
    accelerator: Accelerator,
    bar: tqdm,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Moments (N,2c,h,w) and labels (N,) of the images of each shard; one set of loaders serves for all."""
    cut = [[list(rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)] for rows in shards]
    batches = iter(in_parts(part, [rows for one in cut for rows in one], accelerator))
    images = part.called
    for one in cut:
        moments, labels = [], []
        for rows in one:
            batch = next(batches)
            splits.refuse_not_finite(batch["raw"], images[rows])
            moments.append(moments_of(vae, transform, batch["raw"], accelerator))
            labels.append(batch.get("label"))
            bar.update(len(rows))
        yield torch.cat(moments), None if labels[0] is None else torch.cat(labels)


@torch.inference_mode()
def moments_of(
    vae: Any, transform: ValueTransform, raw: torch.Tensor, accelerator: Accelerator
) -> torch.Tensor:
    """Moments (B,2c,h,w) of raw images (B,C,H,W)."""
    x = transform(raw.to(accelerator.device))
    with accelerator.autocast():
        return vae.encode(x).latent_dist.parameters.cpu()
