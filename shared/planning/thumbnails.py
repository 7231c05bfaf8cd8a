"""What small versions of images tell of a set. Dimension key: N images, C channels, H W pixels."""

import numpy as np
from PIL import Image

SMALL = 8  # pixels of a side
LIKE_OTHERS = 0.6  # share of images that may lie nearer to the others than to mirrored others


def thumbnail(image: np.ndarray) -> np.ndarray:
    """An image (C,H,W) shrunk to SMALL x SMALL."""
    size = (SMALL, SMALL)
    planes = [Image.fromarray(np.asarray(plane, dtype=np.float32)) for plane in image]
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BILINEAR)) for plane in planes])


def border(images: np.ndarray) -> np.ndarray:
    """The outermost pixels of images (N,C,H,W)."""
    rows = images[:, :, [0, -1]].reshape(-1)
    return np.concatenate([rows, images[:, :, :, [0, -1]].reshape(-1)])


def mirrored(small: np.ndarray) -> bool:
    """Whether the nearest neighbour of an image is a mirrored one about as often as one as it is.

    A nearest-neighbour test of two samples (Henze 1988): one half of the thumbnails (N,C,h,w) is held against
    the other, as it is and mirrored.
    """
    if len(small) < 64:
        return False
    one, other = small[::2], small[1::2]

    def nearest(others: np.ndarray) -> np.ndarray:
        flat = one.reshape(len(one), -1)
        against = others.reshape(len(others), -1)
        squares = (flat**2).sum(1)[:, None] + (against**2).sum(1) - 2 * flat @ against.T
        return squares.min(1)

    as_it_is, mirror = nearest(other), nearest(other[..., ::-1])
    return float((as_it_is < mirror).mean() + 0.5 * (as_it_is == mirror).mean()) < LIKE_OTHERS
