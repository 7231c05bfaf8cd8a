"""A pipeline as a folder: written so that it loads elsewhere, read without running anything that it holds.

A folder carries copies of CODE, and its VAE's folder of VAE_CODE. Where this package is installed, no code of
the folder is run, and nothing but JSON and safetensors is read.
"""

import hashlib
import importlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline

from .transforms import ValueTransform

LOCAL = {"use_safetensors": True, "local_files_only": True}  # no pickle, no network
CONSTANTS = ("codec", "value_transform", "classes", "guidance_interval", "sampling")  # of model_index.json
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # of a download
CODE = ("pipeline.py", "folders.py", "calls.py", "editing.py", "restoring.py", "transforms.py")
VAE_CODE = ("model.py", "layers.py")  # of the VAE's folder
UPLOAD = ("repo_id", "commit_message", "private", "token", "create_pr")  # what push_to_hub takes
SAFE_FILES = ["*.json", "*.safetensors"]  # the only ones of a hub's folder that are fetched

MANIFEST = "MANIFEST.json"

Pipeline = TypeVar("Pipeline", bound="SavedPipeline")


class SavedPipeline(DiffusionPipeline):
    """What LatentDiffusionPipeline does with folders."""

    def save_pretrained(self, folder: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write a folder that this class loads, and elsewhere DiffusionPipeline with trusted remote code.

        Raises ValueError where a pickle is asked for.

        Arguments:
            folder: where.
            push_to_hub: upload it as well, once it is whole; repo_id is the folder's name unless given.
            kwargs: of diffusers' save_pretrained, and of push_to_hub.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization: a pipeline of this stack is saved as safetensors only")
        folder = Path(folder)
        upload = {name: kwargs.pop(name) for name in UPLOAD if name in kwargs}
        self.save_parts(folder, **kwargs)
        _seal(folder)
        if push_to_hub:
            self.push_to_hub(upload.pop("repo_id", folder.name), **upload)

    def save_parts(self, folder: Path, **kwargs: Any) -> None:
        """As save_pretrained, without the list of the files: for who writes one."""
        super().save_pretrained(folder, **kwargs)
        here = Path(inspect.getfile(type(self))).parent
        for name in CODE:
            shutil.copy(here / name, folder)
        there = Path(inspect.getfile(type(self.vae))).parent
        for name in VAE_CODE:
            if (there / name).is_file():  # a VAE that an older export brought is one file
                shutil.copy(there / name, folder / "vae")
        for file in folder.rglob("*.json"):
            tree = json.loads(file.read_text())
            tree.pop("_name_or_path", None)  # where the part was loaded from is nobody else's business
            if file.name == "model_index.json":
                tree["_class_name"] = ["pipeline", type(self).__name__]
                tree["vae"] = ["model", type(self.vae).__name__]
            file.write_text(json.dumps(tree, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls: type[Pipeline],
        folder: str | Path,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> Pipeline:
        """A saved folder or a hub id, its parts made by this package's and diffusers' own classes.

        Of a hub's folder only JSON and safetensors are fetched. Raises TypeError for what is not known.

        Arguments:
            folder: where it lies.
            torch_dtype, dtype: of the networks, by either name; None: as they were saved.
            others: parts instead of the saved ones (vae, unet, guide, scheduler), and what a download takes.
        """
        torch_dtype = dtype if torch_dtype is None else torch_dtype
        parts = {name: others.pop(name) for name in ("vae", "unet", "guide", "scheduler") if name in others}
        download = {name: others.pop(name) for name in HUB if name in others}
        if others:
            raise TypeError(f"from_pretrained: {next(iter(others))} is not known here")
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(str(folder), allow_patterns=SAFE_FILES, **download)
        folder = Path(folder).resolve()
        index = json.loads((folder / "model_index.json").read_text())
        for name in ("unet", "guide"):
            if name not in parts and index.get(name, [None])[0]:
                load = diffusers.UNet2DModel.from_pretrained
                parts[name] = load(folder / name, torch_dtype=torch_dtype, **LOCAL)
        if parts.get("unet") is not None and "scheduler" not in parts:
            scheduler = _scheduler_class(index["scheduler"][1])
            parts["scheduler"] = scheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        if "vae" not in parts:
            parts["vae"] = _load_vae(folder / "vae", torch_dtype)
        constants = {name: index[name] for name in CONSTANTS if name in index}
        return cls(**parts, **constants)

    @classmethod
    def from_vae(cls: type[Pipeline], folder: Path, torch_dtype: torch.dtype | None = None) -> Pipeline:
        """The VAE and value transform of a stage-1 checkpoint or latents folder; samples the VAE's prior."""
        transform = ValueTransform.from_pretrained(folder / "value_transform")
        return cls(_load_vae(folder / "vae", torch_dtype), value_transform=transform.config)


def _seal(folder: Path) -> None:
    """List each file with its size and sha256, as shared/disk.py does: what changes later is noticed."""
    listed = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda file=file: file.read(1 << 20), b""):  # type: ignore[misc]
                digest.update(block)
        entry = {"size": path.stat().st_size, "sha256": digest.hexdigest()}
        listed[path.relative_to(folder).as_posix()] = entry
    manifest = {"format": 1, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _scheduler_class(name: str) -> Any:
    """A scheduler of diffusers by its name, and nothing else of diffusers. Raises ValueError."""
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        raise ValueError(f"{name} is not a scheduler of diffusers")
    return found


def vae_class(folder: Path) -> Any:
    """The class of a saved VAE: DeepVAE, or PretrainedVAE around a network of diffusers.

    Imported by name, so that a copy of this file can be read where the package is not installed.
    """
    try:
        name = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = "DeepVAE"  # whose loading says what is wrong with the folder
    model = importlib.import_module("stage1_vae.model")
    return model.PretrainedVAE if name == "PretrainedVAE" else model.DeepVAE


def _load_vae(folder: Path, torch_dtype: torch.dtype | None = None) -> Any:
    return vae_class(folder).from_pretrained(folder.resolve(), torch_dtype=torch_dtype, **LOCAL)
