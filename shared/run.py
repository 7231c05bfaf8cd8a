"""A run folder: its paths, the recipe it was made with, who may go on in it; the newest one. No torch."""

import os
from dataclasses import dataclass
from pathlib import Path

from shared import config, disk
from shared.config import InputError
from shared.recipe import Recipe
from shared.training.config import FREE_KEYS

FOLDERS = {"stage1": "stage1_vae", "stage2": "stage2_diffusion"}


@dataclass(frozen=True)
class StageFolder:
    """What one stage leaves in a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def images(self) -> Path:
        """What the training images were, wherever they lie."""
        return self.path / "images.json"


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run stands."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def stage(self, name: str) -> StageFolder:
        """The folder of `stage1` or `stage2`."""
        return StageFolder(self.path / FOLDERS[name])

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def latents(self) -> Path:
        return self.path / "latents"

    def latents_of(self, recipe: Recipe) -> Path:
        """The latents that stage 2 of a recipe is trained on: from elsewhere where it says so."""
        elsewhere = recipe.stage2.latents if recipe.stage2 else None
        return disk.path_of(elsewhere) if elsewhere else self.latents

    @property
    def pipeline(self) -> Path:
        return self.path / "pipeline"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def report(self) -> Path:
        return self.path / "report"


def open_run(run: str | Path | None) -> tuple[RunFolder, Recipe]:
    """A run folder and the recipe it was made with; by default the newest in runs/. Raises InputError."""
    if run is None:
        found = sorted(Path("runs").glob("*/recipe.yaml"), key=os.path.getmtime)
        if not found:
            raise InputError("no --run given and no run found under runs/ (train one: ./launch.sh demo)")
        run = found[-1].parent
        config.say(f"no --run given: taking the newest, {run}")
    folder = RunFolder(Path(run))
    if not folder.recipe.is_file():
        raise InputError(f"{run}: not a run folder (it has no recipe.yaml)")
    return folder, config.load(Recipe, folder.recipe)


def newest_model(run: RunFolder, recipe: Recipe) -> Path:
    """The newest checkpoint of a run's last stage; its export where there is none."""
    kept = disk.checkpoints(run.stage("stage2" if recipe.stage2 else "stage1").checkpoints)
    return kept[-1] if kept else run.pipeline


def borrows(run: RunFolder, recipe: Recipe) -> bool:
    """Whether a run has no VAE of its own: its latents are from elsewhere."""
    own = disk.checkpoints(run.stage("stage1").checkpoints)
    return not own and run.latents_of(recipe).resolve() != run.latents.resolve()


def model_of(folder: Path) -> str | None:
    """What tells the last network of a checkpoint or an export from others; None where it does not say."""
    listed = disk.sealed(folder)
    names = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
    return next((listed[name]["sha256"][:16] for name in names if name in listed), None)


def measured(run: RunFolder, folder: Path) -> dict:
    """What evaluate found of the weights in a folder of a run; empty where it did not, or of other ones."""
    found = disk.read_json(run.report / "metrics.json", "run python -m shared.evaluate again") or {}
    model = model_of(folder)
    return found if model is None or found.get("model", model) == model else {}


def claim_run(recipe: Recipe, images: dict | None = None) -> None:
    """Write the resolved recipe into its run folder.

    Raises InputError where the folder holds weights made with another recipe or of other images; the message
    names each difference. Keys that no weight depends on may change, and so may the place of the images.

    Arguments:
        recipe: as it was checked.
        images: what tells the training images from others; None where they are not at hand.
    """
    run = RunFolder(recipe.run)
    old = config.load(Recipe, run.recipe) if run.recipe.is_file() else None
    note = run.stage("stage1").images
    known = disk.read_json(note, f"remove {note} if the images are the same")
    for stage in FOLDERS:
        if not old or not disk.checkpoints(run.stage(stage).checkpoints):
            continue
        before, now = (_weights_depend_on(one, stage, known is None) for one in (old, recipe))
        changed = config.differences(before, now)
        if images and known and stage == "stage1":
            changed += config.differences(known, images)
        if changed:
            cure = "undo that or choose another run_dir"
            raise InputError(f"{run} was made with another recipe ({'; '.join(changed)}); {cure}")
    if images:
        disk.write_json(note, images)
    disk.write_text(run.recipe, config.dump(recipe))


def _weights_depend_on(recipe: Recipe, stage: str, with_place: bool) -> dict:
    """The part of the recipe that the weights of a stage depend on; its images' place if nothing else tells
    them."""
    tree = config.as_tree(recipe)
    part = {"seed": tree["seed"], "data": tree["data"], "stage1": tree["stage1"]}
    if stage == "stage2":
        part["stage2"] = tree["stage2"] or {}
    if stage == "stage2" and recipe.stage2:
        part["stage2"]["time"]["kind"] = recipe.stage2.times.kind  # what auto means
    for name in set(part) & set(FOLDERS):
        part[name] = {key: value for key, value in part[name].items() if key not in FREE_KEYS}
    for key in ("num_workers", "max_bad_fraction", "field"):
        del part["data"][key]
    if not with_place:
        del part["data"]["source"]
    if stage == "stage1":
        del part["data"]["augment"]["copies"]  # of the latents
    del part["stage1"]["lpips"]["weights"]
    return part
