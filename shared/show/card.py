"""A model card: what a pipeline draws, from what, how well, how it is loaded, and what it is not.

Markdown with the front matter that the Hugging Face hub reads. Made from files alone. No torch.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import yaml

PICTURE = "samples.png"
MARK = "<!-- written by shared.publish:"  # before a hash of what stands above it

HERE = """\
```python
from shared.sampling.pipeline import LatentDiffusionPipeline   # with Latent Stack: runs no code of the folder
pipe = LatentDiffusionPipeline.from_pretrained("{place}")
pipe({labels}seed=0).images[0]{save}
```"""
ELSEWHERE = """\
```python
from diffusers import DiffusionPipeline   # without it: torch>=2.9, diffusers>=0.36
pipe = DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)
pipe({labels}seed=0).images[0]{save}
```"""


def card(
    name: str,
    place: str,
    recipe: str,
    settings: Mapping[str, Any],
    index: Mapping[str, Any],
    vae: Mapping[str, Any],
    metrics: Mapping[str, Any],
    licence: str | None,
    with_picture: bool,
) -> str:
    """The card as Markdown.

    Arguments:
        name: of the run.
        place: where the folder will lie: a hub id or a path.
        recipe: its YAML.
        settings: the same as flat keys.
        index: the pipeline's model_index.json.
        vae: its vae/config.json.
        metrics: what evaluate found; empty where it has not run.
        licence: of the weights, as the hub knows it; None: not said.
        with_picture: whether PICTURE lies in the folder.
    """
    front = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
    diffusion = any(index.get("unet") or [])
    tags = {"tags": [*(["latent-diffusion"] if diffusion else []), "vae", "latent-stack"]}
    head = yaml.safe_dump(({"license": licence} if licence else {}) | front | tags, sort_keys=False)
    classes = index.get("classes") or []
    grey_levels = (index.get("value_transform") or {}).get("integer")
    shown = settings["data.channels"] in ((1, 3, 4) if grey_levels else (1, 3))
    how = {
        "place": place,
        "labels": f"{classes[0]!r}, " if classes else "",
        "save": '.save("sample.png")' if shown else "   # an array (H,W,C)",
    }
    parts = [
        f"---\n{head}---",
        f"# {name}",
        _what(settings, classes, vae, diffusion),
        f"![Samples]({PICTURE})" if with_picture else "",
        "## How to load it",
        HERE.format(**how),
        ELSEWHERE.format(**how),
        "## How well it draws",
        _figures(metrics),
        "## What it is not",
        _limits(metrics),
        "## The recipe",
        f"```yaml\n{recipe.rstrip()}\n```",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return f"{text}\n{MARK} {_hash(text)} -->\n"


def edited(text: str) -> bool:
    """Whether somebody has changed a card since it was written, or has written it."""
    above, found, below = text.rpartition(f"\n{MARK} ")
    return not found or below.strip() != f"{_hash(above)} -->"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _what(settings: Mapping[str, Any], classes: list[str], vae: Mapping[str, Any], diffusion: bool) -> str:
    size = settings["data.image_size"]
    sides = "x".join(map(str, size if isinstance(size, list) else [size, size]))
    more = " ..." if len(classes) > 12 else ""
    kinds = f" of {len(classes)} classes ({', '.join(classes[:12])}{more})" if classes else ""
    latents = "x".join(map(str, vae.get("latent_shape") or settings["stage1.model.latent_shape"]))
    model, unet = ("A latent diffusion model", ", and a UNet on these") if diffusion else ("A model", "")
    autoencoder = "an autoencoder" if vae.get("posterior") == "deterministic" else "a variational autoencoder"
    return (
        f"{model} that draws images of {settings['data.channels']}x{sides}{kinds}, trained with Latent Stack "
        f"on `{settings['data.source']}`: {autoencoder} with latents of {latents}{unet}."
    )


def _figures(metrics: Mapping[str, Any]) -> str:
    """Every figure with how many images it is of, and the network that it is by."""
    samples = metrics.get("samples")
    if not samples:
        return "Not measured (`python -m shared.evaluate` measures it)."
    rows = [
        f"| {key.upper() if len(key) < 4 else key} | {samples[key]:.4g} |"
        for key in ("fid", "kid", "precision", "recall")
        if samples.get(key) is not None
    ]
    if metrics.get("rfid") is not None:
        rows.append(f"| FID of reconstructions | {metrics['rfid']:.4g} |")
    seen = f"{metrics.get('generated_images')} samples against {metrics.get('real_images')} images"
    seen += f" ({metrics.get('split', 'held out')})"
    return f"{seen}, by {metrics.get('extractor')}, one seed.\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _limits(metrics: Mapping[str, Any]) -> str:
    lines = [
        "It draws what its training images show, with their gaps and their bias, and at their size. It was "
        "not tested for any use."
    ]
    figures = metrics.get("memorisation") or {}
    near = figures.get("share_nearer_than_99_percent_of_held_out")
    if near is None:
        lines.append("Whether samples repeat training images was not measured.")
    else:
        lines.append(
            f"Memorisation: {near:.1%} of the samples lie nearer to a training image than 99 % of held-out "
            f"images do ({figures.get('by_chance', 0.01):.0%} is what chance gives)."
        )
    return " ".join(lines)
