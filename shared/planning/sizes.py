"""Which sizes images may be trained at, and what becomes of theirs. Pure, as rules.py is; sizes in pixels."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from shared.config import InputError
from shared.data.config import BUILT_IN, patch_steps, patches_of
from shared.planning.facts import Images, family

LONGEST = 4.0  # a side in terms of the other; what is longer is cut
NATIVE = 72**2  # pixels up to which images of one size keep it, rounded to eights
UNIT = 8  # pixels, of which a side is a multiple
LEAST = 16  # pixels of a side


def sizes(images: Images, given: Mapping[str, Any], large: bool) -> list[list[int]]:
    """Sizes [height, width] that may be trained at, the largest first; above 64 px only if large."""
    if "data.image_size" in given:
        size = given["data.image_size"]
        if isinstance(size, list) and len(size) != 2:
            raise InputError(f"data.image_size: a number, or [height, width], not {size}")
        return [size if isinstance(size, list) else [size, size]]
    if cut_into_patches(images, given):
        return [[32, 32]]
    tried = (128, 64, 32) if large else (64, 32)
    whole = in_blocks(images, given)
    own = _padded(images, 1) if whole else _rounded(images)
    if images.uniform and max(own) <= 128 and math.prod(own) <= NATIVE:
        halves = (
            min(own) >= 64 and family(images) == "picture"
        )  # grey levels may be shrunk where time is short
        return [own, [side // 2 for side in own]] if halves else [own]
    if whole:
        return [_padded(images, math.ceil((images.height * images.width) ** 0.5 / side)) for side in tried]
    fitting = [side for side in tried if side <= 1.25 * min(images.height, images.width)] or [32]
    return [_sides(images, side) for side in fitting]


def in_blocks(images: Images, given: Mapping[str, Any]) -> bool:
    """Whether cells are put together in whole blocks: a hit then stays one, and nothing is cut."""
    sparse = family(images) == "sparse" and images.longer <= LONGEST
    return sparse and given.get("data.resize", "pad") == "pad"


def _rounded(images: Images) -> list[int]:
    """Their own sides, rounded."""
    return [max(LEAST, UNIT * round(side / UNIT)) for side in (images.height, images.width)]


def _padded(images: Images, block: int) -> list[int]:
    """The sides of what blocks of block x block cells leave, rounded up."""
    left = [math.ceil(side / block) for side in (images.height, images.width)]
    return [max(LEAST, UNIT * math.ceil(side / UNIT)) for side in left]


def _sides(images: Images, side: int) -> list[int]:
    """A square, or the rectangle of about that area that most of the images are alike to."""
    aspect = min(max(images.width / images.height, 1 / LONGEST), LONGEST)
    if images.alike < 0.5 or 0.8 <= aspect <= 1.25:
        return [side, side]
    unit = 2 * UNIT if side >= 64 else UNIT
    lengths = range(unit, int(LONGEST * side) + 1, unit)

    def unlike(size: tuple[int, int]) -> float:
        """What another aspect cuts off weighs twice as much as another area."""
        height, width = size
        return 2 * abs(math.log(width / height / aspect)) + abs(math.log(height * width / side**2))

    best: tuple[int, int] = min(itertools.product(lengths, lengths), key=unlike)
    return list(best)


def share_of_area(images: Images, size: list[int], resize: str) -> float:
    """The area of a cell in terms of that of one that is trained on, as data/images.py shrinks values."""
    ratios = [side / own for side, own in zip(size, (images.height, images.width), strict=True)]
    if resize == "patches" or images.source in BUILT_IN:  # which are made in any size
        return 1.0
    if resize == "pad":
        return 1 / max(1, math.ceil(1 / min(ratios))) ** 2
    return min(1.0, math.prod(ratios) if resize == "stretch" else max(ratios) ** 2)


# ---------------------------------------------------------------- patches


def cut_into_patches(images: Images, given: Mapping[str, Any]) -> bool:
    """Whether parts of the images are learned: as asked, or where an array holds too few, but large ones."""
    few = images.is_array and images.count < 500 and min(images.height, images.width) >= 96
    return given.get("data.resize", "patches" if few else "crop") == "patches"


def pieces(images: Images, size: list[int], resize: str) -> int:
    """How many an image is cut into."""
    if resize != "patches":
        return 1
    whole = (images.height, images.width)
    return patches_of(whole, size, patch_steps(images.there or images.count, whole, size))
