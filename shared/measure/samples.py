"""Samples against held-out images: distances, memorisation, and a field's own statistics."""

from shared.config import InputError


def judge(run, recipe, vae, transform, training, part, options, accelerator) -> dict:
    """Samples, reconstructions and training images against held-out ones."""
    from shared import trained
    from shared.data import splits
    from shared.measure import features

    device, sampling = accelerator.device, recipe.sampling
    pipe = trained.open_pipeline(run).to(device)
    seen, seen_labels = trained.pixels(training, transform, 10_000)
    x, labels = trained.pixels(part, transform, options.num_images)
    if min(len(x), len(seen)) < 4:
        raise InputError(f"data.val_fraction: {len(x)} held-out images say nothing about samples; at least 4 are needed (or --split NAME)")
    extractor = features.choose(options.extractor, trained.are_photographs(training), seen, seen_labels, device)
    classes = trained.labels_like(seen_labels, pipe.config.classes, options.num_images)
    noise = pipe.noises(options.seed, options.num_images)
    with accelerator.autocast():
        values, drawn = trained.sample(pipe, noise, classes, sampling.guidance_scale, sampling.num_steps, 64, accelerator)
        x_hat = trained.decode(vae, trained.encode(vae, x, device)[0], device)
    real = extractor.all(x, device, "held-out images")
    floor = seen[splits.evenly(len(seen), len(drawn))]
    samples, seen_again, decoded = (
        extractor.all(images, device, words)
        for words, images in (("samples", drawn.float()), ("training images", floor), ("reconstructions", x_hat))
    )
    result = {
        "extractor": extractor.name, "real_images": len(x), "generated_images": len(drawn), "floor_images": len(floor),
        "samples": features.distances(samples, real), "rfid": features.fid(decoded, real),
        "training_against_held_out": features.distances(seen_again, real),
        "memorisation": memorisation(run, drawn.float(), x, training, transform, accelerator),
    }  # fmt: skip
    if recipe.data.field:
        result["statistics"] = statistics(run, recipe.data.field, values, classes, transform.inverse(x), labels, pipe.config.classes)
    return result


def memorisation(run, drawn, x, training, transform, accelerator) -> dict:
    """How near samples are to their nearest training image, beside how near held-out images are; draws the nearest pairs."""
    import torch

    from shared.data import splits
    from shared.data import batches
    from shared.measure import features
    from shared.show import grids

    rows = splits.evenly(len(training), 200_000)
    shown = batches.in_order(training, rows, 256, accelerator)
    targets = torch.cat([features.shrunk(transform(batch["raw"])) for batch in shown])
    (distance, places), (usual, _) = (features.nearest(features.shrunk(images), targets) for images in (drawn, x))
    closest = distance.argsort()[:8]
    copied = transform(training.__getitems__([rows[place] for place in places[closest].tolist()])["raw"])
    grids.grid(torch.cat([drawn[closest], copied]), len(closest)).save(run / "report" / "nearest.png")
    return {
        "training_images": len(rows), "samples_to_training": distance.median().item(), "held_out_to_training": usual.median().item(),
        "share_nearer_than_99_percent_of_held_out": (distance < usual.quantile(0.01)).float().mean().item(),
    }  # fmt: skip


def statistics(run, field: str, generated, classes, real, labels, names) -> dict:
    """The field's statistics of generated values (N,C,H,W) against real ones: of all, and of each class by itself."""
    from shared.measure import fields
    from shared.show import plots

    generated, real = generated.numpy(), real.numpy()
    tables = {"all": fields.compare(field, generated, real)}
    if classes is not None and labels is not None:
        for number, name in enumerate(names):
            ours, theirs = generated[classes == number], real[labels == number]
            if min(len(ours), len(theirs)) >= 4:
                tables[name] = fields.compare(field, ours, theirs)
    plots.statistics(field, generated, real).savefig(run / "report" / "statistics.png")
    return tables
