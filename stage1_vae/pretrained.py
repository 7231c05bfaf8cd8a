"""The VAE of a recipe: new, saved before, or trained by others, and what of it is trained further.

Does not depend on data or losses.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError

from shared import disk
from shared.config import InputError
from shared.data.config import DataConfig
from shared.sampling.folders import vae_class
from stage1_vae.config import ModelConfig
from stage1_vae.model import PRETRAINED, DeepVAE, PretrainedVAE

DECODER = ("network.decoder.", "network.post_quant_conv.")


def make_vae(config: ModelConfig, data: DataConfig) -> DeepVAE | PretrainedVAE:
    """The VAE of a recipe; of a pretrained one only what is to be trained has requires_grad.

    Raises InputError where the pretrained one cannot be had or does not fit the images.
    """
    if config.pretrained is None:
        return DeepVAE(in_channels=data.channels, image_size=data.image_size, **config.network)
    vae = open_pretrained(config.pretrained, data)
    for name, parameter in vae.named_parameters():
        trained = config.train == "all" or (config.train == "decoder" and name.startswith(DECODER))
        parameter.requires_grad_(trained)
    return vae


def load_vae(folder: Path) -> Any:
    """A VAE that this stack saved, of either class. Raises InputError."""
    return disk.load_module(vae_class(folder), folder)


def open_pretrained(place: str, data: DataConfig) -> PretrainedVAE:
    """An autoencoder of diffusers, from a folder, a pipeline's folder or the hub, for images of a recipe."""
    network = _download(place)
    config: Any = network.config
    channels = config.in_channels
    if channels != data.channels:
        raise InputError(f"stage1.model.pretrained: {place} is for {channels} channels: set data.channels")
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    factor = 2 ** (len(stages) - 1)
    if any(side % factor for side in data.size):
        raise InputError(f"data.image_size: {data.image_size} is not divisible by {factor}, as {place} wants")
    height, width = (side // factor for side in data.size)
    plain = json.loads(network.to_json_string())
    plain = {name: value for name, value in plain.items() if not name.startswith("_")}
    kind = type(network).__name__
    shape = (config.latent_channels, height, width)
    posterior = "gaussian" if kind == "AutoencoderKL" else "deterministic"
    vae = PretrainedVAE(kind, plain, shape, posterior)
    vae.network.load_state_dict(network.state_dict())
    return vae


def _download(place: str) -> Any:
    """The network itself; a folder is read without the network, anything else is asked of the hub."""
    folder = disk.path_of(place)
    source = str(folder.resolve()) if folder.is_dir() else place
    options: dict[str, Any] = {"local_files_only": folder.is_dir(), "subfolder": None}
    if folder.is_dir() and not (folder / "config.json").is_file():
        options["subfolder"] = "vae"  # of a pipeline
    try:
        kind: Any = DeepVAE.load_config(source, **options).get("_class_name")
        if kind not in PRETRAINED:
            raise ValueError(f"it holds {kind}, not {' or '.join(PRETRAINED)}")
        loader = getattr(diffusers, kind).from_pretrained
        network, info = loader(source, use_safetensors=True, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise ValueError(f"weights are missing, such as {info['missing_keys'][0]}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        cure = "name the folder or hub id of one"
        raise InputError(f"stage1.model.pretrained: {place} cannot be opened ({reason}); {cure}") from None
    return network
