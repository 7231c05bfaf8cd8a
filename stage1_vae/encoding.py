"""A run's images -> saved latents, by the averaged weights of its newest stage-1 checkpoint.

Each process encodes whole shards, so that an interrupted run goes on to the same bytes with any number of
processes. Dimension key: N images, c h w latents.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from shared import config
from shared.data import latents, sources, splits
from shared.data.augment import Copies
from shared.data.batches import Batches, in_order
from shared.data.config import DataConfig
from shared.sampling.transforms import ValueTransform
from shared.training import checkpoint
from shared.training.processes import on_first_process
from stage1_vae.pretrained import load_vae

BATCH = 64  # images encoded at once


def encode(checkpoints: Path, folder: Path, data: DataConfig, head: str, accelerator: Accelerator) -> None:
    """Encode both splits of the images into a folder; a finished one of the same VAE and images is kept.

    Raises InputError where there is no checkpoint yet, or the folder holds other latents.
    """
    newest = checkpoint.required(checkpoints)
    source = sources.open_source(data)
    training, held_out = splits.split(source, data)
    identities = {"train": splits.identity(training, data), "val": splits.identity(held_out, data)}
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
    write_shards(vae, transform, parts, plan, accelerator)
    accelerator.wait_for_everyone()
    manifest = on_first_process(
        accelerator, lambda: latents.finish(folder, newest, head == "linear", source.names, plan)
    )
    count = sum(map(len, parts.values()))
    config.say(f"{folder}: {count:,} latents of {len(manifest['classes']) or 'no'} classes")


def write_shards(
    vae: Any,
    transform: ValueTransform,
    parts: dict[str, Batches],
    plan: latents.Plan,
    accelerator: Accelerator,
) -> None:
    """Write the shards of this process that are not there yet."""
    shards = [(name, path, rows) for name, entries in plan.items() for path, rows in entries]
    total = sum(map(len, parts.values()))
    with tqdm(total=total, unit="img", desc="encoding", disable=not accelerator.is_main_process) as bar:
        for index, (name, path, rows) in enumerate(shards):
            mine = index % accelerator.num_processes == accelerator.process_index
            if mine and not latents.shard_is_whole(path, len(rows)):
                latents.write_shard(path, *encode_rows(vae, transform, parts[name], rows, accelerator, bar))
            else:
                bar.update(len(rows))


def encode_rows(
    vae: Any, transform: ValueTransform, part: Batches, rows: range, accelerator: Accelerator, bar: tqdm
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Moments (N,2c,h,w) and labels (N,) of some images of a split."""
    moments, labels = [], []
    with torch.inference_mode(), accelerator.autocast():
        for batch in in_order(part, rows, BATCH, accelerator):
            x = transform(batch["raw"].to(accelerator.device, non_blocking=True))
            moments.append(torch.cat(vae.moments(x), dim=1).cpu())
            if "label" in batch:
                labels.append(batch["label"])
            bar.update(len(x))
    return torch.cat(moments), torch.cat(labels) if labels else None
