"""How many steps fit into the minutes. Pure, as rules.py is; times in seconds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.config import InputError
from shared.data.config import by_channel
from shared.planning.facts import Images, Pace, family
from shared.planning.rules import (
    ADVERSARIAL_FROM,
    CHECKING,
    ENCODING,
    GOOD,
    LEAST_SEEN,
    LEAST_STEPS,
    SAVED,
    SETTLING,
    SHARE,
    STARTS,
    SUSTAINED,
    Choices,
    hold_out,
)
from shared.planning.sizes import pieces

FEWEST_ENCODED = 1000  # images that are encoded, however long it takes
FEWEST_CUT = 4  # images of which patches are cut, however long it takes
# Of latents of 16x8x8 and long trainings a larger denoiser learns more; tried on photos of 64 px only.
USUAL_UNET = [96, 192]
LARGER_UNET = {
    "stage2.unet.channels": [128, 256],
    "stage2.unet.blocks_per_level": 2,
    "stage2.unet.attention_levels": [1],
}
LARGER_FROM = 600_000  # latents that stage 2 sees, repeated ones too; at 210,000 it did not pay yet
MANY = 3000  # images; of fewer, the usual one is overfitted by then
LARGER_SHARE = 0.3  # of the training time for stage 1
# Looks at a latent, beyond which images are learned by heart: of 300 photos or jets, of 1,800 emoji. Of
# thousands 58 looks were the most that was tried, and met no limit. Shifted copies helped those photos; they
# harmed the emoji.
LOOKS_FEW = 70  # of fewer than FEW images
LOOKS = 120
LOOKS_SHIFTED = 20  # at a shifted copy, or at a patch: of 20 recorded fields the error rose after some ten
FEW = 1000  # images
SHIFT = 0.1  # of the shorter side
MOST_COPIES = 32  # of an image
FEWEST_SEEN = 30_000  # latents, without which there is nothing but blots
BY_HEART = "more would be learned by heart"


@dataclass(frozen=True)
class Part:
    """What a stage gets of the time."""

    steps: int = 0
    seen: int = 0  # images, each time it is seen
    seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """How the time is divided, in seconds, and how far each stage gets."""

    stage1: Part
    stage2: Part
    encoding: float
    samples: float
    planning: float
    starts: float
    reading: float  # large files, which are decoded once, and values that are looked at as a whole
    images: int  # that are learned from; patches, where images are cut into them

    @property
    def total(self) -> float:
        parts = self.planning + self.starts + self.reading + self.encoding + self.samples
        return parts + self.stage1.seconds + self.stage2.seconds


def divide(choices: Choices, images: Images, pace: Pace, minutes: float | None, spent: float) -> Budget:
    """Steps for both stages, written into the choices; a set too large to be encoded in time is limited.

    Arguments:
        choices: with the networks; steps, rhythm and rates come in here.
        images: what there is.
        pace: measured with these networks.
        minutes: for everything up to the samples, planning included; None: what a good result takes.
        spent: seconds of planning until now.

    Raises:
        InputError: where the minutes are too few.
    """
    starts = (STARTS - 2 * choices.one_stage) * pace.command
    if minutes is not None and not choices.one_stage:
        starts += pace.command + SETTLING  # stage 2's steps are looked at again
    samples = pace.draw * choices.lines["sampling.num_images"][0]
    left = None if minutes is None else minutes * 60 - spent - starts - samples
    share = _share_of_stage1(choices, images)
    _shift_few(choices, images, pace, left, 1 - share)
    count, encoding = _encoding(choices, images, pace, left, 1 - share)
    most = most_seen(count, choices.copies, choices.lines["data.resize"][0])
    decoded = _decoded(choices, count, pace, left)
    reading = pace.read * count * measures(choices, images) + pace.decode * decoded
    overhead = spent + starts + reading + samples + encoding
    seconds = None if minutes is None else minutes * 60 - overhead
    parts = _parts(choices, pace, seconds, share, GOOD[_nearest(choices.sides)], most)
    if minutes is not None:
        _refuse_if_short(choices, parts, minutes, overhead / 60)
    stage1, stage2 = (parts.get(stage, Part()) for stage in ("stage1", "stage2"))
    return Budget(stage1, stage2, encoding, samples, spent, starts, reading, count)


def _parts(
    choices: Choices, pace: Pace, seconds: float | None, share: float, wanted: tuple[int, int], most: float
) -> dict[str, Part]:
    """What each stage gets of the seconds; where one's steps were given, the other has all of the rest."""
    stages = {}
    if choices.only_encodes:
        choices.take("stage1.max_steps", 1, "none are taken")
    else:
        stages["stage1"] = (_step1(choices, pace), pace.check1, wanted[0], math.inf)
    if not choices.one_stage:
        stages["stage2"] = (pace.step2, pace.check2, wanted[1], most)
    own = [stage for stage in stages if f"{stage}.max_steps" in choices.given]
    parts = {}
    for stage in sorted(stages, key=lambda stage: stage not in own):
        part = 1.0 if own and stage not in own else {"stage1": share, "stage2": 1 - share}[stage]
        parts[stage] = _stage(choices, stage, seconds, part, *stages[stage])
        if seconds is not None and stage in own:
            seconds -= parts[stage].seconds
    return parts


def settle(
    pace: Mapping[str, float], batch_size: int, num_images: int, most: float, left: float
) -> Choices | None:
    """Stage 2's steps and rhythm anew, by the time that is left once the latents are there.

    None where too little is left for a stage 2: the plan is carried out as it was.

    Arguments:
        pace: command, step2, check2 and draw of facts.Pace, as measured now.
        batch_size, num_images: of stage 2, and of the samples at its end.
        most: latents that stage 2 may see, all looks at them counted.
        left: seconds until the samples shall be there.
    """
    choices = Choices({})
    choices.take("stage2.batch_size", batch_size, "")
    seconds = left - 2 * pace["command"] - pace["draw"] * num_images
    part = _stage(choices, "stage2", seconds, 1.0, pace["step2"], pace["check2"], 0, most)
    return choices if part.steps >= LEAST_STEPS else None


def enlarge(choices: Choices, images: Images, budget: Budget) -> bool:
    """Whether a larger denoiser was chosen: where there is time for more than the usual one learns from.

    A step of it takes more than twice as long, so the minutes have to be divided anew.
    """
    channels, _ = choices.lines.get("stage2.unet.channels", (None, ""))
    usual = family(images) == "picture" and channels == USUAL_UNET
    own = any(key.startswith(("stage2.unet", "stage2.max_", "stage2.init")) for key in choices.given)
    _, reason = choices.lines.get("stage2.max_steps", (None, ""))
    more = budget.stage2.seen >= LARGER_FROM or reason == BY_HEART
    if not usual or own or not more or images.count < MANY:
        return False
    reason = f"there is time for more latents than {USUAL_UNET} learns from"
    for key, value in LARGER_UNET.items():
        choices.take(key, value, reason)
        reason = ""  # said once
    return True


def enough(choices: Choices, budget: Budget) -> bool:
    """Whether both stages see enough images to be worth the size."""
    least1, least2 = LEAST_SEEN[_nearest(choices.sides)]
    return reached(choices, budget, least1, least2)


def reached(choices: Choices, budget: Budget, first: float, second: float) -> bool:
    """Whether each stage that is trained sees at least these numbers of images."""
    one = choices.only_encodes or budget.stage1.seen >= first
    return one and (choices.one_stage or budget.stage2.seen >= second)


def _nearest(size: list[int]) -> int:
    """The side of a square that was tried and is nearest in area."""
    return min(GOOD, key=lambda known: abs(math.log(known**2 / math.prod(size))))


def _adversarial(choices: Choices) -> bool:
    return bool(choices.lines.get("stage1.loss_weights.adversarial", (0, ""))[0])


def _step1(choices: Choices, pace: Pace) -> float:
    """The average step of stage 1: the adversarial term begins later."""
    if not _adversarial(choices):
        return pace.step1
    return ADVERSARIAL_FROM * pace.step1 + (1 - ADVERSARIAL_FROM) * pace.step1_adversarial


def _share_of_stage1(choices: Choices, images: Images) -> float:
    """Of the training time."""
    if choices.only_encodes or choices.one_stage:
        return float(choices.one_stage)
    return LARGER_SHARE if LARGER_UNET.keys() <= choices.lines.keys() else SHARE[family(images)]


def _latents_a_second(choices: Choices, pace: Pace, share: float) -> float:
    """How many stage 2 sees in each second of all training, of which it has a share."""
    return share * choices.lines["stage2.batch_size"][0] / (pace.step2 * SUSTAINED)


def _shift_few(choices: Choices, images: Images, pace: Pace, left: float | None, share: float) -> None:
    """Shifted copies of few pictures, where stage 2 would see latents too often in its share of the time."""
    own = {"data.augment.shift", "data.augment.copies"} & choices.given.keys()
    if own or choices.one_stage or family(images) != "picture":  # of fields nobody knows what may be shifted
        return
    size = choices.sides
    count = images.count * pieces(images, size, choices.lines["data.resize"][0])
    usual = choices.copies  # 2 where images are mirrored
    if "stage2.max_steps" in choices.given:
        seen = choices.given["stage2.max_steps"] * choices.lines["stage2.batch_size"][0]
    else:
        _, wanted = GOOD[_nearest(size)]
        seen = wanted if left is None else left * _latents_a_second(choices, pace, share)
    if count >= FEW or seen <= most_seen(count, usual, choices.lines["data.resize"][0]):
        return
    number = min(usual * math.ceil(seen / (LOOKS_SHIFTED * count * usual)), MOST_COPIES)
    if left is not None:
        number = min(number, int(ENCODING * left / (count * pace.encode)))
    if number > usual:
        choices.take("data.augment.shift", max(1, round(SHIFT * min(size))), "pixels: few images, made more")
        choices.take("data.augment.copies", number, "as they are, and shifted, for stage 2")


def most_seen(count: int, each: int, resize: str) -> float:
    """How many latents stage 2 may see, all looks counted, of `count` images and `each` copies of each.

    resize: that of the recipe; patches overlap, and show a place as shifted copies do.
    """
    looks = LOOKS_SHIFTED if resize == "patches" else LOOKS if count >= FEW else LOOKS_FEW
    return max(looks * count * each, FEWEST_SEEN)


def _encoding(
    choices: Choices, images: Images, pace: Pace, left: float | None, share: float
) -> tuple[int, float]:
    """How many images are learned from, each cut into some, and the seconds that encoding them takes.

    Of too many images a part is taken: what can be encoded in a tenth of the time, and no more than stage 2,
    with its share of the rest, will see.
    """
    count = images.count
    cut = pieces(images, choices.sides, choices.lines["data.resize"][0])
    if choices.one_stage:
        return cut * count, 0.0
    each = cut * pace.encode * choices.copies
    whole = each + pace.decode
    limits = {}
    if left is not None:
        limits["encoding all of them would take more than a tenth of the time"] = ENCODING * left / whole
    if left is not None and cut == 1:
        rate = _latents_a_second(choices, pace, share)
        limits["stage 2 will see no more"] = left * rate / (choices.copies + whole * rate)
    reason, limit = min(limits.items(), key=lambda entry: entry[1], default=("", math.inf))
    limit = max(limit, FEWEST_CUT if cut > 1 else FEWEST_ENCODED)
    if limit < count:
        count = choices.take("data.limit", int(limit), reason) or count
        if cut == 1:
            hold_out(choices, count)
    return cut * count, each * count


def _decoded(choices: Choices, count: int, pace: Pace, left: float | None) -> float:
    """How many images are decoded: all that are encoded; where none is, what stage 1 has time for."""
    if left is None or not choices.one_stage:
        return count
    each = _step1(choices, pace) / choices.lines["stage1.batch_size"][0] + pace.decode
    return min(count, left / max(each, 1e-9))


def measures(choices: Choices, images: Images) -> bool:
    """Whether stage 1 reads all images, for the bounds of their values or for values that are no numbers."""
    lines = choices.finish()
    keys = (f"data.value_transform.{key}" for key in ("kind", "low", "high"))
    kind, low, high = (lines.get(key, (None, ""))[0] for key in keys)
    open_bounds = kind not in (None, "auto", "range") and any(None in row for row in by_channel(low, high))
    return bool(images.values) or open_bounds


def checks(seconds: float, check: float, least: int) -> int:
    """How often a stage that takes these seconds is validated, drawn and saved."""
    return min(max(least, int(CHECKING * seconds / max(check, 1e-9))), 6)


def _refuse_if_short(choices: Choices, parts: Mapping[str, Part], minutes: float, overhead: float) -> None:
    given = [stage for stage in parts if f"{stage}.max_steps" in choices.given]
    fewest = min((part.steps for stage, part in parts.items() if stage not in given), default=LEAST_STEPS)
    if fewest >= LEAST_STEPS:
        return
    overhead += sum(parts[stage].seconds for stage in given) / 60
    needed = math.ceil(overhead + max(minutes - overhead, 0.05) * LEAST_STEPS / max(fewest, 1))
    also = "the steps that you gave" if given else "drawing"
    raise InputError(
        f"--minutes: {minutes:g} are too few: starting, encoding and {also} take {overhead:.1f} of them and "
        f"leave a stage {fewest} steps; give it {max(needed, math.ceil(minutes + 1))}, or a smaller "
        "data.image_size"
    )


def _stage(
    choices: Choices,
    stage: str,
    seconds: float | None,
    share: float,
    step: float,
    check: float,
    wanted: int,
    most: float,
) -> Part:
    """The steps of a stage that fit into its share of the seconds, or see as many images as wanted.

    Those that see more than `most` images are left out.
    What follows from them is chosen with them: averages, warm-up, rhythm.
    """
    take = choices.take
    batch = choices.lines[f"{stage}.batch_size"][0]
    step *= SUSTAINED
    least = 2 if stage == "stage2" else 1  # of one error nobody knows whether it still falls
    if seconds is None:
        fitting, reason = wanted / batch, f"{wanted:,} images seen, as good results took"
    else:
        fitting = (seconds * share - checks(seconds * share, check, least) * check) / step
        reason = f"{share:.0%} of the time for steps" if share < 1 else "what is left of the time"
    limit = max(most / batch, LEAST_STEPS)
    if fitting > limit:
        fitting, reason = math.ceil(limit), BY_HEART
    steps = take(f"{stage}.max_steps", max(1, int(fitting)), reason)
    if stage == "stage1" and _adversarial(choices):
        take("stage1.discriminator.start_step", round(ADVERSARIAL_FROM * steps), "reconstructions first")
        take("stage1.discriminator.ramp_steps", max(1, round(0.08 * steps)), "")
    take(f"{stage}.optim.warmup_steps", max(1, min(100, steps // 10)), "")
    take(f"{stage}.ema.decay", 0.99 if steps < 600 else 0.999, "the weights of the last hundreds of steps")
    times = checks(steps * step, check, least)
    every = max(1, math.ceil(steps / times))
    saved = max(1, min(every, int(SAVED / step)))
    take(f"{stage}.save_every", saved, f"{saved * step / 60:.1f} minutes: what a crash may cost")
    take(f"{stage}.validate_every", every, "")
    take(f"{stage}.preview_every", every, "")
    return Part(steps, steps * batch, steps * step + times * check)
