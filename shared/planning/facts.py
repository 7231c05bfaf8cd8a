"""What the rules are told of the images and of the machine, and how long its steps take. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Values:
    """Of an array's values, in the user's units."""

    low: float
    high: float
    zeros: float  # the share of values that are zero; of several channels the least
    tail: float  # the 99.9th percentile over the mean; likewise
    reach: float  # the largest of either sign over the knee; likewise
    knee: float  # the 95th percentile of the values that are not zero
    knees: tuple[float, ...]  # that of each channel
    levels: tuple[float, float] | None = None  # of pictures whose 256 grey levels were made floats: the range


@dataclass(frozen=True)
class Images:
    """Of a set of images; of most of it, by those that were looked at."""

    source: str
    count: int
    height: int  # the median, in pixels
    width: int
    alike: float  # the share of images within an eighth of the median's aspect
    uniform: bool  # whether all have one size
    channels: int
    integer: bool  # grey levels 0..255
    looked: int
    there: int = 0  # images of the source, where data.limit leaves fewer
    is_array: bool = False
    label_column: str | None = None
    classes: Mapping[str, int] | None = None  # how many images each has
    deep: bool = False  # grey levels of 16 bits
    unreadable: tuple[str, ...] = ()
    duplicates: int = 0
    mirrored: bool = False  # whether a mirrored image looks like one of the set
    framed: bool = False  # whether their border is empty, so that zeros around change nothing
    brightest: int = 255  # of grey levels
    values: Values | None = None  # of arrays that are no grey levels

    @property
    def longer(self) -> float:
        """The longer side in terms of the shorter."""
        return max(self.height, self.width) / min(self.height, self.width)


def family(images: Images) -> str:
    """picture | field | sparse: grey levels; values of an array; an array that is mostly zeros."""
    if images.values is None or images.values.levels:
        return "picture"
    return "sparse" if images.values.zeros > 0.5 and images.values.low >= 0 else "field"


@dataclass(frozen=True)
class Machine:
    """Of the machine, and of what lies on it."""

    name: str
    disk: int  # bytes free where the run will be
    perceptual: bool  # whether weights of LPIPS lie here


@dataclass(frozen=True)
class Pace:
    """Seconds, measured here with the networks that are planned."""

    command: float  # until a command takes its first step
    step1: float  # of stage 1, before the adversarial term
    step1_adversarial: float
    check1: float  # a validation, a picture and a save
    read: float  # an image, by one process
    decode: float  # an image, the first time alone: of a large file, which is kept as small as it is needed
    encode: float  # an image, reading included
    step2: float
    check2: float
    draw: float  # a sample
    disk: int  # bytes of the checkpoints that a run keeps
    latents: int  # bytes of an image's latents
