"""What all formats have in common: a stack of slices before it is read, and errors that name the file.

Dimension key: n slices, C channels, H W pixels.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import InputError


@dataclass
class Part:
    """The slices of one file before they are read."""

    path: Path
    shape: tuple[int, ...]  # (n,H,W), (n,C,H,W) or (n,H,W,C)
    dtype: np.dtype  # of the values in their units
    read: Callable[[], Iterator[np.ndarray]]  # the slices in their order, some at a time
    columns: dict[str, list] = field(default_factory=dict)  # what is known of each slice, n values by name

    def blocks(self) -> Iterator[np.ndarray]:
        """The slices in their order, some at a time. Raises InputError."""
        parts = self.read()
        while True:
            block = named(self.path, lambda: next(parts, None))
            if block is None:
                return
            yield block


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{name} is needed to read this: pip install 'latent-stack[formats]'") from None


def named(path: Path, action: Callable[[], Any]) -> Any:
    """What the action returns; whatever a library says of a damaged file is one line that names it."""
    try:
        return action()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # each library has errors of its own
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({said})") from None


def real(dtype: np.dtype) -> np.dtype:
    """The type that values are kept in: as they are, but no wider than float32. Raises InputError."""
    if dtype.kind not in "buif":
        raise InputError(f"holds values of type {dtype}; images are real numbers")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype.newbyteorder("=")
