"""What lies below a folder, as a person sees it: not what tools hide or leave behind. Links are entered."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HIDDEN = (".", "__")  # how the names of folders begin that tools hide or leave behind


def names_below(folder: Path) -> Iterator[str]:
    """The names of all files below: not what tools hide or leave behind."""
    for root in itertools.chain([folder], linked_folders(folder)):
        for _, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
            yield from (name for name in names if not name.startswith("."))


def folders_of(place: Path) -> list[Path]:
    """The sub-folders in which images may lie: not those that tools hide or leave behind."""
    return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(HIDDEN)]


def uppermost(files: Sequence[str], root: Path) -> list[str]:
    """The folder directly below the root that each file lies in; empty for a file that lies in none."""
    below = (os.path.abspath(file).removeprefix(f"{root}/").rpartition("/") for file in files)
    return [folders.partition("/")[0] for folders, _, _ in below]


def without_ending(names: Iterable[str]) -> list[str]:
    """Those of files that have none, or what a server made of one: photo, photo.jpg?w=640, a.jpg_large."""
    made = re.compile(r"\.(jpe?g|png|webp|gif)[^.]+$")
    return [name for name in names if "." not in name or made.search(name.lower())]


def linked_folders(root: Path) -> Iterator[Path]:
    """Folders below that are links, which a pattern does not enter; none that leads in a circle."""
    for place, names, _ in os.walk(root, followlinks=True):
        here = Path(place)
        links = [here / name for name in names if (here / name).is_symlink()]
        above = {folder.resolve() for folder in (here, *here.parents)} if links else set()
        circles = {link.name for link in links if link.resolve() in above}
        names[:] = [name for name in names if name not in circles and not name.startswith(HIDDEN)]
        yield from (link for link in links if link.name in names)
