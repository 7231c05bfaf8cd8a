"""A run folder: what stands where in it, which recipe it was made with, and the newest one."""

import os
from dataclasses import asdict
from pathlib import Path

from shared import config
from shared.config import InputError
from shared.disk import write_whole
from shared.recipe import Recipe
from shared.training.config import FREE_KEYS

FOLDERS = {"stage1": "stage1_vae", "stage2": "stage2_diffusion"}


def open_run(run: str | Path | None) -> tuple[Path, Recipe]:
    """A run folder and the recipe it was made with; without a name the newest run under runs/."""
    if run is None:
        found = sorted(Path("runs").glob("*/recipe.yaml"), key=os.path.getmtime)
        if not found:
            raise InputError("no --run given and no run found under runs/ (train one: ./launch.sh demo)")
        run = found[-1].parent
        config.say(f"no --run given: taking the newest, {run}")
    if not (Path(run) / "recipe.yaml").is_file():
        raise InputError(f"{run}: not a run folder (it has no recipe.yaml)")
    return Path(run), config.load(Recipe, Path(run) / "recipe.yaml")


def _weights_depend_on(recipe: Recipe, stage: str) -> dict:
    """The part of the recipe that the weights of a stage depend on."""
    tree = asdict(recipe)
    part = {"seed": tree["seed"], "data": tree["data"], "stage1": tree["stage1"]}
    if stage == "stage2":
        part["stage2"] = tree["stage2"] or {}
    for name in set(part) & set(FOLDERS):
        part[name] = {key: value for key, value in part[name].items() if key not in FREE_KEYS}
    del part["data"]["num_workers"], part["data"]["max_bad_fraction"], part["data"]["field"], part["stage1"]["lpips"]["weights"]
    return part


def claim_run(recipe: Recipe) -> None:
    """Write the resolved recipe into its run folder.

    Raises InputError where the folder holds weights made with another recipe; the message names each
    difference. Keys that no weight depends on may change.
    """
    run = recipe.run
    if (run / "recipe.yaml").is_file():
        old = config.load(Recipe, run / "recipe.yaml")
        for stage, folder in FOLDERS.items():
            changed = config.differences(_weights_depend_on(old, stage), _weights_depend_on(recipe, stage))
            if changed and any((run / folder / "checkpoints").glob("step_*")):
                raise InputError(f"{run} was made with another recipe ({'; '.join(changed)}); undo that or choose another run_dir")
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / "recipe.yaml", config.dump(recipe))
