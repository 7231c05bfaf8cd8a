"""Plan a recipe for a folder, a file or a hub id, within the minutes there are; trains nothing.

`python -m shared.plan SOURCE [--minutes M] [--out FILE.yaml] [key.sub=value ...]` looks at the images and the
machine, times some steps, and writes a recipe in which each line has its reason. Without --minutes it plans
what a good result takes. The last line that it prints is the recipe's path. The same command again, when the
latents are there, plans stage 2's steps anew by the time that is left.
"""

import argparse
import math
import re
import shlex
import time
import unicodedata
from pathlib import Path

from shared import config, disk, recipe
from shared.config import InputError

BEGUN = time.perf_counter()


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.plan", description="Plan a recipe for these images and this machine."
    )
    parser.add_argument("source", help="a folder, a file, a hub id, or built in: as data.source")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="for everything up to the samples (default: what it takes)"
    )
    parser.add_argument("--out", metavar="FILE.yaml", help="where the recipe goes (runs/<name>/plan.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="what shall not be planned")
    options = parser.parse_intermixed_args()
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        raise InputError(f"--minutes: must be more than 0, not {options.minutes:g}")
    recipe.check_overrides(options.overrides)
    options.given = config.flat_overrides(options.overrides)
    for stage in ("stage1", "stage2"):
        if options.given.get(f"{stage}.max_epochs") or options.given.get(f"{stage}.max_steps", 1) is None:
            cure = f"say {stage}.max_steps, or nothing of its length"
            raise InputError(f"{stage}.max_epochs: a plan counts steps; {cure}")
    beyond = next((key for key in options.given if key.startswith("stage2.")), None)
    if beyond and options.given.get("stage2", "planned") is None:
        raise InputError(f"{beyond}: is of stage 2, and stage2=null says that there is none")
    options.source = options.given.pop("data.source", options.source)
    return options


def run_name(source: str) -> str:
    """A name for the run, from what the source is called."""
    last = disk.path_of(source).resolve().name if disk.path_of(source).exists() else source
    last = unicodedata.normalize("NFC", last)  # on a Mac a name comes in two ways
    return re.sub(r"[^\w-]+", "_", Path(last.rsplit("/", 1)[-1]).stem).strip("_") or "images"


def planned_before(path: Path, command: str, elsewhere: bool) -> bool:
    """Whether the plan in a file is this one.

    Raises InputError where a training of another plan stands in the file's folder, unless it lies elsewhere.
    """
    from shared.planning.write import command_of

    before = command_of(path)
    if before == command:
        return True
    if not elsewhere and any(path.parent.glob("*/checkpoints/step_*")):
        again = f"say that again, or ./launch.sh {path} key=value with what may change"
        found = f"a training of `{before}`: {again}" if before else "the training of another recipe"
        raise InputError(f"{path.parent} holds {found}, or name=ANOTHER for a new one")
    return False


def main() -> None:
    options = parse()
    given, source = options.given, options.source
    name = str(given.get("name", run_name(source)))
    path = Path(options.out or disk.path_of(str(given.get("run_dir") or f"runs/{name}")) / "plan.yaml")
    minutes = [] if options.minutes is None else ["--minutes", f"{options.minutes:g}"]
    command = shlex.join(["python", "-m", "shared.plan", source, *minutes, *options.overrides])
    again = planned_before(path, command, bool(options.out))
    from shared.planning import planner  # imports torch

    begun = BEGUN
    if again and not any(recipe.load(path, needs_images=False).run.glob("*/checkpoints/step_*")):
        looked = time.perf_counter()
        again = planner.still_of(path, source, given)
        begun += time.perf_counter() - looked  # no command of the run will look
    if again:
        config.say(f"planned before: {path}")
        planner.settle(path, options.minutes, given, begun)
    else:
        planner.plan(name, source, options.minutes, given, path, command, begun)
    config.say(str(path))


if __name__ == "__main__":
    config.run(main)
