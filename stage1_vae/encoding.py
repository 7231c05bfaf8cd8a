"""Images of a run -> saved moments."""

from shared import config


def encode(run, recipe, accelerator) -> None:
    """Encode both splits of a run's images with the averaged weights of its newest stage-1 checkpoint."""
    from shared import disk
    from shared.data import latents, sources, splits
    from shared.sampling.transforms import ValueTransform
    from shared.training import checkpoint
    from shared.training.processes import on_first_process
    from stage1_vae.model import DeepVAE

    newest = checkpoint.required(run / "stage1_vae" / "checkpoints")
    source = sources.open_source(recipe.data)
    parts = dict(zip(("train", "val"), splits.split(source, recipe.data), strict=True))
    folder = run / "latents"
    wanted = latents.fingerprint(newest, {name: splits.identity(part, recipe.data) for name, part in parts.items()})
    latents.refuse_if_stale(folder, wanted)
    if latents.read_manifest(folder):
        config.say(f"{folder}: up to date")
        return
    on_first_process(accelerator, lambda: latents.begin(folder, wanted))
    vae = disk.load_module(DeepVAE, newest / "vae").to(accelerator.device).eval()
    write_shards(vae, ValueTransform.from_pretrained(newest / "value_transform"), parts, folder, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest = latents.finish(folder, newest, recipe.stage1.model.head == "linear", source.names)
        config.say(f"{folder}: {sum(len(p) for p in parts.values()):,} latents of {len(manifest['classes']) or 'no'} classes")


def write_shards(vae, transform, splits, folder, accelerator) -> None:
    """Write the shards of this process that are not there yet."""
    from tqdm import tqdm

    from shared.data import latents

    shards = [(name, n) for name, part in splits.items() for n in range(-(-len(part) // latents.SHARD))]
    total, silent = sum(map(len, splits.values())), not accelerator.is_main_process
    with tqdm(total=total, unit="img", desc="encoding", disable=silent) as bar:
        for index, (name, number) in enumerate(shards):
            first = number * latents.SHARD
            rows = range(first, min(first + latents.SHARD, len(splits[name])))
            path = latents.shard_path(folder, name, number)
            if index % accelerator.num_processes == accelerator.process_index and not latents.shard_is_whole(path, len(rows)):
                latents.write_shard(path, *encode_rows(vae, transform, splits[name], rows, accelerator, bar))
            else:
                bar.update(len(rows))


def encode_rows(vae, transform, part, rows: range, accelerator, bar):
    """Moments (N,2c,h,w) and labels (N,) of some images of a split."""
    import torch

    from shared.data.batches import in_order

    moments, labels = [], []
    with torch.inference_mode(), accelerator.autocast():
        for batch in in_order(part, rows, 64, accelerator):
            x = transform(batch["raw"].to(accelerator.device, non_blocking=True))
            moments.append(torch.cat(vae.moments(x), dim=1).cpu())
            labels.append(batch.get("label"))
            bar.update(len(x))
    return torch.cat(moments), None if labels[0] is None else torch.cat(labels)
