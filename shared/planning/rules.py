"""Which recipe a set of images, a machine and a number of minutes call for: rules, each with its reason.

Facts and measured seconds come in, keys with their values and reasons go out. The trials behind the rules
stand in tests/benchmarks/RESULTS.md ("The plan"). No torch, no files.
"""

import math
from collections.abc import Mapping
from typing import Any

from shared.config import InputError
from shared.planning.facts import Images, Machine, Values, family
from shared.planning.sizes import LONGEST, cut_into_patches, in_blocks, share_of_area

LEAST_IMAGES = 16  # fewer are learned by heart
NAMED = 5  # classes, or unreadable images, of many
LEAST_SIDE = 8  # pixels; stage 1 halves them twice
LEAST_STEPS = 50  # of a stage
SHARE = {"picture": 0.45, "field": 0.45, "sparse": 0.6}  # of the training time, for stage 1
ADVERSARIAL_FROM = 0.3  # of stage 1's steps
ENCODING = 0.1  # of the time at most; images beyond that are left out
SUSTAINED = 1.03  # a training is slower than its first seconds: the processor's clock falls
SAVED = 600.0  # seconds between two checkpoints at most
CHECKING = 0.04  # of a stage's time, for validations, pictures and saves
STARTS = 4  # commands: stage 1, latents, stage 2, samples
SETTLING = 5.0  # seconds in which stage 2's steps are timed again, once the latents are there
MOST_HELD_OUT = 500
PATCHES = ("patches", "all patches of an image stay in one split")
FAR = 30  # times what 95 % stay below: beside that the rest is next to nothing
UNITS = 10  # times another's knee: from there on channels are of different units
DARK = 128  # grey levels; where nothing is brighter, their range is measured
LARGE_FROM = 60  # minutes; without a GPU 128 px are not tried in fewer
# Images that stages 1 and 2 have to see for a size to be worth it, and what a good result takes. Those of 128
# px are four times those of 64 px, as the pixels are, and were not tried.
LEAST_SEEN = {32: (0, 0), 64: (12_000, 30_000), 128: (48_000, 120_000)}
GOOD = {32: (63_000, 219_000), 64: (80_000, 300_000), 128: (320_000, 1_200_000)}


class Choices:
    """The keys of a recipe that were chosen, each with its reason. What the user gave stays as it is."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = dict(given)
        self.lines: dict[str, tuple[Any, str]] = {}

    def take(self, key: str, value: Any, reason: str) -> Any:
        """Note a choice, and return what is valid: the value, or the user's own."""
        if key in self.given:
            value, reason = self.given[key], "as you said"
        self.lines[key] = (value, reason)
        return value

    @property
    def pretrained(self) -> bool:
        """Whether the VAE comes from outside."""
        return bool(self.given.get("stage1.model.pretrained"))

    @property
    def only_encodes(self) -> bool:
        """Whether stage 1 is a pretrained autoencoder that stays as it is."""
        return self.given.get("stage1.model.train") == "nothing"

    @property
    def one_stage(self) -> bool:
        """Whether the user wants no stage 2."""
        return "stage2" in self.given and self.given["stage2"] is None

    @property
    def sides(self) -> list[int]:
        """Height and width that were chosen."""
        size = self.lines["data.image_size"][0]
        return size if isinstance(size, list) else [size, size]

    @property
    def copies(self) -> int:
        """Of each image in the saved latents."""
        return self.finish().get("data.augment.copies", (1, ""))[0]

    def finish(self) -> dict[str, tuple[Any, str]]:
        """All lines, with what the user gave beyond the rules."""
        return self.lines | {
            key: (value, "as you said") for key, value in self.given.items() if key not in self.lines
        }


# ---------------------------------------------------------------- what can be planned at all


def refuse(images: Images, given: Mapping[str, Any]) -> None:
    """Raises InputError where no recipe would help: too few images, too small ones, too many unreadable."""
    where = f"data.source: {images.source}"
    if images.count < LEAST_IMAGES and not cut_into_patches(images, given):
        limited = given.get("data.limit") == images.count
        cure = f"raise data.limit, which is {images.count}" if limited else "add more"
        raise InputError(
            f"{where} holds {images.count} images; fewer than {LEAST_IMAGES} are learned by heart: {cure}"
        )
    if min(images.height, images.width) < LEAST_SIDE:
        raise InputError(
            f"{where} holds images of {images.height}x{images.width} px; at least {LEAST_SIDE} px are needed"
        )
    if len(images.unreadable) > images.looked / 10:
        raise InputError(
            f"{where}: {len(images.unreadable)} of {images.looked} images cannot be read, such as "
            f"{', '.join(images.unreadable[:NAMED])}: remove them"
        )


# ---------------------------------------------------------------- the images


def data_rules(choices: Choices, images: Images, size: list[int]) -> None:
    """Where the images come from and what they become."""
    take = choices.take
    square = size[0] == size[1]
    take("data.source", images.source, f"{images.count:,} images of {images.height}x{images.width} px")
    if images.classes:
        least, most = min(images.classes.values()), max(images.classes.values())
        each = f"{least:,}" + (f" to {most:,}" if most > least else "")
        reason = f"{len(images.classes)} classes of {each} images: samples can be asked by class"
        take("data.label_column", images.label_column or "auto", reason)
    elif images.label_column is None:
        take("data.label_column", None, "nothing that divides the images into classes")
    patches = cut_into_patches(images, choices.given)
    reason = (
        f"of patches, for {images.count} images are few" if patches else _size_reason(choices, images, size)
    )
    take("data.image_size", size[0] if square else size, reason)
    take("data.channels", images.channels, _channels_reason(images))
    resize = take("data.resize", *(PATCHES if patches else _resizing(images, size)))
    if images.values and images.values.levels:
        low, high = images.values.levels
        if take("data.value_transform.kind", "range", "pictures: 256 grey levels as floats") == "range":
            take("data.value_transform.low", low, "black")
            take("data.value_transform.high", high, "white")
    elif images.values:
        _value_rules(choices, images, images.values, share_of_area(images, size, resize))
        known = square and images.source in ("speckle", "jets")
        reason = "evaluate holds the statistics of drawn values against held-out ones"
        take("data.field", images.source if known else "generic", reason)
    elif images.brightest < DARK:
        reason = f"nothing is brighter than {images.brightest} of 255"
        take("data.value_transform.kind", "minmax", reason)
    if images.mirrored and family(images) == "picture":
        flip = take("data.augment.flip", "horizontal", "mirrored images look like others of the set")
        if images.count <= 20_000 and flip != "none":
            take("data.augment.copies", 2, "stage 2 sees each image mirrored, too")
    if patches:
        take("data.val_fraction", 0.1, "of the images, with all of their patches")
    else:
        hold_out(choices, images.count)
    if images.unreadable:
        share = 2 * len(images.unreadable) / images.looked
        reason = f"{len(images.unreadable)} of {images.looked} cannot be read, such as {images.unreadable[0]}"
        take("data.max_bad_fraction", max(0.01, float(f"{share:.2g}")), reason)


def hold_out(choices: Choices, count: int) -> None:
    """The share of this number of images that is held out."""
    share = max(min(0.05, MOST_HELD_OUT / count), min(0.2, 32 / count))
    choices.take("data.val_fraction", float(f"{share:.2g}"), "a twentieth, but 32 to 500 images")


def _size_reason(choices: Choices, images: Images, size: list[int]) -> str:
    if size == [images.height, images.width]:
        return "their own"
    if in_blocks(images, choices.given):
        block = round(share_of_area(images, size, "pad") ** -0.5)
        return f"{block}x{block} cells become one" if block > 1 else "their own, and zeros around"
    if images.alike >= 0.5 and images.longer > LONGEST:
        return f"{images.longer:.0f} times as long as wide: the middle {LONGEST:.0f}:1 is kept"
    return "what the time allows" if size[0] == size[1] else "most are of this aspect"


def _channels_reason(images: Images) -> str:
    if images.is_array:
        return "as many as the array has"
    return {1: "grey", 3: "colour", 4: "transparency is learned, too"}.get(images.channels, "")


def _resizing(images: Images, size: list[int]) -> tuple[str, str]:
    if in_blocks(images, {}):
        return "pad", "zeros around change nothing; where it is too large, whole blocks of cells become one"
    smaller = images.height <= size[0] and images.width <= size[1]
    if smaller and images.framed and [images.height, images.width] != size:
        return "pad", "their border is empty: zeros around change nothing"
    return "crop", "the short side fits, the centre is kept"


def _value_rules(choices: Choices, images: Images, values: Values, area: float) -> None:
    """How an array's values become [-1, 1]; area: of a cell of theirs, in terms of one that is trained on.

    What is shrunk becomes means over areas, of which all but a cell or two are empty in a sparse set.
    """
    take = choices.take
    area = area if family(images) == "sparse" else 1.0
    if family(images) == "sparse":
        wanted, reason = "log1p", f"{values.zeros:.0%} zeros, and values up to {values.high:.4g}"
    elif values.low >= 0 and values.tail > 5:
        wanted, reason = "sqrt", f"a long tail: 0.1 % lie {values.tail:.0f} times above the mean"
    elif values.low < 0 and values.reach > FAR:
        wanted, reason = "asinh", f"both signs, and up to {values.reach:.0f} times what 95 % stay below"
    else:
        wanted, reason = "minmax", f"{values.low:.4g} to {values.high:.4g}, measured on the training images"
    if take("data.value_transform.kind", wanted, reason) != wanted or wanted == "minmax":
        return
    if wanted != "asinh":
        take("data.value_transform.low", 0, "nothing is negative")
    if wanted != "sqrt":
        knee, *knees = (float(f"{area * one:.2g}") for one in (values.knee, *values.knees))
        units = max(knees) > UNITS * min(knees)
        reason = f"{'each' if units else 'the'} knee: 95 % of what is not zero"
        take("data.value_transform.scale", knees if units else knee, reason)


# ---------------------------------------------------------------- the networks


def network_rules(choices: Choices, images: Images, size: list[int], machine: Machine) -> None:
    """Both networks, their losses and optimizers."""
    kind, take = family(images), choices.take
    usual = [4, size[0] // 8, size[1] // 8]  # of autoencoders from outside
    shape = usual if choices.pretrained else _new_latents(choices, images, size)
    if choices.only_encodes:
        take("stage1.loss_weights.l1", 1.0, "to be looked at: nothing is trained")
    elif kind == "picture":
        _picture(choices, images, size, machine)
    elif kind == "sparse":
        _sparse(choices)
    else:
        _field(choices)
    if kind == "picture":
        _sample_pictures(choices, images)
    else:
        _sample_values(choices)
    take("stage1.batch_size", 32, "small batches learn fastest per image")
    if choices.one_stage:
        return
    width = 96 if shape[0] >= 12 else 64
    levels = 2 if all(side % 2 == 0 for side in shape[1:]) else 1
    take(
        "stage2.unet.channels",
        [width * 2**level for level in range(levels)],
        f"for {shape[0]} channels of latents",
    )
    if choices.given.get("stage2.optim.name", "muon") == "muon":
        take("stage2.optim.lr", 6e-3, "of Muon")
    take("stage2.batch_size", 128, "")


def _new_latents(choices: Choices, images: Images, size: list[int]) -> list[int]:
    """The stages of a new VAE, and the shape (c,h,w) of its latents."""
    depth = max(2, round(math.log2((size[0] * size[1]) ** 0.5 / 16)))
    widths = [32, *(64 * 2**level for level in range(depth - 2)), 128]
    depth = len(choices.take("stage1.model.channels", widths, f"{2**depth} times smaller sides"))
    grid = [side // 2**depth for side in size]
    fold = 2 if min(grid) >= 12 and all(side % 4 == 0 for side in grid) else 1
    latent = 4 * -(-images.channels // 4)
    shape = [latent * fold**2, grid[0] // fold, grid[1] // fold]
    reason = f"dz = {math.prod(shape):,}"
    reason += ", folded: a quarter of the places for stage 2" if fold == 2 else ""
    return choices.take("stage1.model.latent_shape", shape, reason)


def _picture(choices: Choices, images: Images, size: list[int], machine: Machine) -> None:
    take = choices.take
    take("stage1.loss_weights.l1", 1.0, "")
    take("stage1.loss_weights.mse", 1.0, "")
    if min(size) >= 48:
        _kl(choices, 0.01, "latents near N(0, 1), some 3 bits each")
    else:
        _kl(choices, 0.001, "latents near N(0, 1), some 5 bits each")
    if min(size) >= 32:
        take("stage1.loss_weights.adversarial", 0.05, "texture")
    if images.channels in (3, 4) and min(size) >= 96 and machine.perceptual:
        take("stage1.loss_weights.lpips", 0.5, "sharper; its weights lie here")
        take("stage1.lpips.net", "alex", "a tenth of VGG's cost")


def _kl(choices: Choices, weight: float, reason: str) -> None:
    """Unless the user wants an autoencoder, which has no posterior."""
    if choices.given.get("stage1.model.posterior") != "deterministic":
        choices.take("stage1.loss_weights.kl", weight, reason)


def _sample_pictures(choices: Choices, images: Images) -> None:
    """How pictures are sampled."""
    take = choices.take
    if not choices.one_stage:
        take("stage2.guide_at", 0.16, "samples are led away from an early checkpoint")
        take("sampling.guidance_scale", 2.0, "away from the guide")
        if images.classes and choices.given.get("stage2.label_dropout", 0.1):
            take("sampling.unconditional_guide", True, "and from no class: samples keep closer to theirs")
        take("sampling.num_steps", 8, "of dpmpp: more do not help")
        if choices.given.get("stage2.objective", "flow") == "flow":
            take("sampling.shift", 2.0, "most of them near noise, where a picture takes shape")
    count = len(images.classes) if images.classes and len(images.classes) <= 100 else 10
    take(
        "sampling.num_images",
        count * max(1, 100 // count),
        "rows of one of each class" if images.classes else "",
    )


def _field(choices: Choices) -> None:
    take = choices.take
    take("stage1.loss_weights.mse", 1.0, "values, not looks")
    _kl(choices, 0.0002, "fine structure needs the bits")


def _sample_values(choices: Choices) -> None:
    """How fields are sampled."""
    choices.take("sampling.guidance_scale", 1.0, "guidance changes the statistics of fields")
    choices.take("sampling.num_steps", 20, "fewer lose variance")
    choices.take("sampling.num_images", 64, "")


def _sparse(choices: Choices) -> None:
    hurdle = choices.given.get("stage1.model.output_activation", "hurdle") == "hurdle"
    if choices.pretrained or not hurdle:  # which is of a new network
        _field(choices)
        return
    take = choices.take
    take("stage1.model.output_activation", "hurdle", "a gate for each cell: an empty one is exactly 0")
    take("stage1.loss_weights.hurdle", 1.0, "")
    take("stage1.activity_weight", 2000, "values within some hundredths of the range, where a gate is open")
    _kl(choices, 0.001, "latents near N(0, 1)")
