"""The plan from end to end: look, draft, time, divide the minutes, write, and say what was found."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from shared import disk, recipe
from shared.config import InputError, say
from shared.data import latents
from shared.measure.estimate import for_people
from shared.planning import budget, expectation, rules, sizes, timing, write
from shared.planning.budget import Budget
from shared.planning.facts import Images, Machine, Pace
from shared.planning.look import look
from shared.planning.rules import NAMED, Choices
from shared.run import RunFolder
from shared.training.config import FREE_KEYS
from shared.training.processes import join_processes
from shared.training.similarity import BACKBONES

DRAFT_STEPS = 100_000  # of a recipe whose steps are timed
ALL_BUT = 0.95  # of what stage 2 may see is as good as all of it
PAUSE = 60  # seconds; a run that wrote nothing for longer was stopped


def plan(
    name: str,
    source: str,
    minutes: float | None,
    given: Mapping[str, Any],
    path: Path,
    command: str,
    begun: float,
) -> None:
    """Plan a recipe and write it to a file.

    Raises InputError where there is nothing to plan; nothing is written then.

    Arguments:
        name: of the run, unless given.
        source: as data.source.
        minutes: for everything up to the samples; None: what a good result takes.
        given: dotted keys that the user has set.
        path: of the recipe.
        command: that asks for this plan.
        begun: when planning began, by time.perf_counter.
    """
    imported = time.perf_counter()
    images = look(source, given)
    rules.refuse(images, given)
    looked = time.perf_counter() - imported
    notes = [_of_images(images)]
    say(notes[0])
    device = join_processes().device
    machine = Machine(
        name=timing.machine_name(device),
        disk=disk.free(path.parent),
        perceptual=_perceptual(),
    )
    notes.append(f"machine: {machine.name}, {for_people(machine.disk)} of disk free")
    say(notes[-1])
    large = device.type == "cuda" or (minutes or 0) >= rules.LARGE_FROM

    def divided(choices: Choices) -> tuple[Pace, Budget]:
        started = time.perf_counter()
        command = started - (imported - begun)
        pace = timing.measure(_checked(choices, images), command, timing.spent(minutes))
        return pace, budget.divide(choices, images, pace, minutes, time.perf_counter() - begun)

    drafts = [draft(name, images, size, machine, given) for size in sizes.sizes(images, given, large)]
    choices, pace, found = _choose(drafts, images, divided)
    needed = _needed(choices, found, pace, machine)
    notes += _results(choices, images, found, needed, minutes)
    for note in notes[2:]:
        say(note)
    _checked(choices)
    if minutes:
        notes.append(write.due(_end(minutes, begun)))
    disk.write_text(path, write.text(choices.finish(), command, notes))
    timed = time.perf_counter() - begun - looked
    say(f"looked for {looked:.0f} s, timed for {timed:.0f} s; each choice and its reason:")


def _choose(
    drafts: Sequence[Choices], images: Images, divided: Callable[[Choices], tuple[Pace, Budget]]
) -> tuple[Choices, Pace, Budget]:
    """The first draft, of the largest size, that the minutes are enough for; a larger denoiser where they are
    more than that. Raises InputError where none fits.

    Arguments:
        drafts: by size, the largest first.
        images: what there is.
        divided: measures the pace of a draft, and divides the minutes.
    """
    fits = None
    for choices in drafts:
        try:
            pace, found = divided(choices)
        except InputError:
            if fits is None and choices is drafts[-1]:
                raise
            continue  # a smaller one may fit, or is too small for what was given
        fits = choices, pace, found
        if budget.enough(choices, found):
            break
    assert fits is not None  # else it was raised
    choices, pace, found = fits
    if budget.enlarge(choices, images, found):
        pace, found = divided(choices)
    return choices, pace, found


def _perceptual() -> bool:
    """Whether the weights of the perceptual loss are here."""
    try:
        return disk.weights_file(BACKBONES["alex"]) is not None
    except InputError as error:
        say(f"note: {error}; planned without a perceptual loss")
        return False


def _needed(choices: Choices, found: Budget, pace: Pace, machine: Machine) -> int:
    """The bytes that the run will hold. Raises InputError where the disk has fewer."""
    needed = pace.disk + found.images * choices.copies * pace.latents
    if needed > machine.disk:
        held, free = for_people(needed), for_people(machine.disk)
        raise InputError(
            f"the run would hold {held}, but {free} are free where it will be: run_dir=ELSEWHERE"
        )
    return needed


def still_of(path: Path, source: str, given: Mapping[str, Any]) -> bool:
    """Whether the plan in a file, of which nothing is trained yet, is of the images that are there now."""
    lines = (line.removeprefix("# ") for line in path.read_text("utf-8").splitlines())
    same = _counted(_of_images(look(source, given))) in map(_counted, lines)
    if not same:
        say(f"note: {source} has changed since {path} was made: it is planned anew")
    return same


def settle(path: Path, minutes: float | None, given: Mapping[str, Any], begun: float) -> None:
    """Plan stage 2's steps anew, by what is left of the minutes and by the machine as it is now.

    A processor's clock moves, and stage 1 took what it took. Only between the latents and stage 2's first
    checkpoint; not where the time is over, or where the steps were given. The minutes of a plan of which
    nothing is trained yet begin now, and a pause of a training does not count. No more than
    budget.most_seen says, however much time is left.
    """
    made, until = recipe.load(path), write.until(path)
    if minutes is None or until is None:
        return
    run = RunFolder(made.run)
    folder = run.latents_of(made)
    manifest = folder / "manifest.json"
    if disk.checkpoints(run.stage("stage1").checkpoints):
        until += _pause(path, manifest, *(run.stage(stage).metrics for stage in ("stage1", "stage2")))
    else:
        until = _end(minutes, begun)
    disk.write_text(path, write.postponed(path.read_text("utf-8"), until))
    ready = manifest.is_file() and not disk.checkpoints(run.stage("stage2").checkpoints)
    if made.stage2 is None or not ready or "stage2.max_steps" in given:
        return
    cache = latents.open_cache(folder)
    pace = timing.of_stage2(made, made.stage2, cache, begun, timing.spent(minutes))
    left = (until - datetime.now()).total_seconds()
    each = made.data.augment.copies
    count = len(cache.split("train")) // each + len(cache.split("val"))
    most = budget.most_seen(count, each, made.data.resize)
    found = budget.settle(pace, made.stage2.batch_size, made.sampling.num_images, most, left)
    if found:
        free = {key for key in found.lines if key.rpartition(".")[2] in FREE_KEYS} - set(given)
        values = {key: found.lines[key][0] for key in free}
        disk.write_text(path, write.replaced(path.read_text("utf-8"), values))
        was, now = made.stage2.max_steps, values["stage2.max_steps"]
        say(f"{_time(left)} are left: {now:,} steps of stage 2, where {was:,} were planned")


def _pause(*files: Path) -> timedelta:
    """How long a run has written none of these files; nothing where that is but the start of a command."""
    idle = time.time() - max(file.stat().st_mtime for file in files if file.exists())
    return timedelta(seconds=idle if idle > PAUSE else 0)


def _end(minutes: float, begun: float) -> datetime:
    """When the minutes of a command will be over that began at a time of time.perf_counter."""
    return datetime.now() + timedelta(seconds=minutes * 60 - (time.perf_counter() - begun))


def draft(name: str, images: Images, size: list[int], machine: Machine, given: Mapping[str, Any]) -> Choices:
    """All choices but those that need times."""
    choices = Choices(given)
    choices.take("name", name, "the run folder is runs/<name>")
    rules.data_rules(choices, images, size)
    rules.network_rules(choices, images, size, machine)
    return choices


def _checked(choices: Choices, drafted: Images | None = None) -> recipe.Recipe:
    """The recipe of some choices, read as every recipe is. Raises InputError.

    drafted: of a draft, which is timed, the images: the bounds of their values are guessed, not measured.
    """
    lines = choices.finish()
    if drafted:
        values = drafted.values
        low, high = (values.low, values.high) if values else (0, drafted.brightest)
        kind, _ = lines.get("data.value_transform.kind", (None, ""))
        if budget.measures(choices, drafted) and isinstance(kind, str) and low < high:
            guessed = {"data.value_transform.low": (low, ""), "data.value_transform.high": (high, "")}
            lines = guessed | lines
        stages = ["stage1"] if choices.one_stage else ["stage1", "stage2"]
        steps = {f"{stage}.max_steps": (DRAFT_STEPS, "") for stage in stages}
        lines = lines | steps | {f"stage1.discriminator.{key}": (n, "") for key, n in timing.DRAFT.items()}
    with tempfile.TemporaryDirectory(prefix="latent-stack-") as place:
        path = Path(place) / "plan.yaml"
        path.write_text(write.text(lines, "", []))
        return recipe.load(path)


# ---------------------------------------------------------------- in words


def _of_images(images: Images) -> str:
    several = f"{images.channels} channel{'s' if images.channels > 1 else ''}"
    kind = {1: "grey", 3: "in colour", 4: "with transparency"}.get(images.channels, several)
    if images.values:
        kind = f"{several}, {images.values.low:.4g} to {images.values.high:.4g}"
        kind += f", {images.values.zeros:.0%} zeros" if images.values.zeros > 0.1 else ""
    size = f"{images.height}x{images.width} px" + ("" if images.uniform else " (the median)")
    parts = [f"images: {images.count:,} of {size}, {kind}{', 16 bits' if images.deep else ''}"]
    if images.classes:
        least, most = min(images.classes.values()), max(images.classes.values())
        column = "" if images.label_column in (None, "auto", "label") else f" by {images.label_column}"
        size = f"{least:,}" + (f" to {most:,}" if most > least else "")
        names = ", ".join(list(images.classes)[:NAMED]) + ", ..." * (len(images.classes) > NAMED)
        parts.append(f"{len(images.classes)} classes{column} ({names}) of {size}")
    bad, twice = len(images.unreadable), images.duplicates
    parts.append(
        f"of {images.looked:,} looked at {bad or 'none'} unreadable, {twice or 'none'} exact duplicates"
    )
    return "; ".join(parts)


def _results(
    choices: Choices, images: Images, found: Budget, needed: int, minutes: float | None
) -> list[str]:
    """What was planned, how long it takes, what it leaves on the disk, what to expect: a line each."""
    sides = choices.sides
    shape = choices.lines.get("stage1.model.latent_shape", (["a pretrained VAE"], ""))[0]
    stages = [("stage 1", found.stage1)] + ([] if choices.one_stage else [("stage 2", found.stage2)])
    steps = [
        f"{part.steps:,} steps of {title} ({_number(part.seen / found.images)} looks at each image)"
        for title, part in stages
        if part.steps
    ]
    divided = {"planning": found.planning, "starts": found.starts, "reading": found.reading}
    divided |= {"stage 1": found.stage1.seconds, "latents": found.encoding}
    divided |= {"stage 2": found.stage2.seconds, "samples": found.samples}
    parts = ", ".join(f"{part} {_time(seconds)}" for part, seconds in divided.items() if seconds >= 0.5)
    end = datetime.now() + timedelta(seconds=found.total - found.planning)
    asked = f"of {minutes:g} minutes" if minutes else "for a good result"
    lines = [
        f"plan: {sides[0]}x{sides[1]} px, latents of {'x'.join(map(str, shape))}; {', '.join(steps)}",
        f"time: {_time(found.total)} {asked}: {parts}; begun now, samples at {end:%H:%M}",
        f"disk: {for_people(needed)}",
        f"expect: {expectation.expected(choices, images, found)}",
    ]
    resize = choices.lines["data.resize"][0]
    if found.stage2.seen > ALL_BUT * budget.most_seen(found.images, choices.copies, resize):
        lines.append(
            "note: these images are learned by heart beyond this: more of them help, more time does not"
        )
    return lines


def _counted(line: str) -> list[str]:
    """Of the line that tells of images how many there are, their size and classes; the rest may be of those
    that there was time to look at."""
    first, *rest = line.split("; ")
    size = first.split(", ")[0]
    return [size.split(" of ")[0] if "median" in size else size, *rest[:-1]]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
