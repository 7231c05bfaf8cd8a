"""One self-contained HTML page of one or several runs.

`python -m shared.report --run RUN [RUN ...] [--out FILE]`

Draws what stands on disk (recipe, logs, previews, samples, and what evaluate and doctor wrote); computes
nothing of its own. Several runs stand side by side, and where three or more differ in one number, that key's
trade-off is drawn. By default RUN/report/report.html, of several runs the first one's report/comparison.html.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from shared import config, disk
from shared.config import InputError
from shared.recipe import Recipe
from shared.run import RunFolder, measured, model_of, newest_model, open_run

if TYPE_CHECKING:
    from shared.show.page import Shown

# file in the run folder (of a folder its last picture), title, what it shows
PICTURES = (
    ("samples/grid.png", "Samples", "drawn by the finished model"),
    ("stage1_vae/previews", "Reconstructions", "held-out images over their reconstructions"),
    ("report/statistics.png", "The field's own statistics", "generated against held-out images"),
    ("report/reconstructions.gif", "Reconstructions over the training", "held-out images over theirs"),
    (
        "report/latent_space.gif",
        "Latents over the training",
        "held-out images, in the last checkpoint's plane",
    ),
    ("report/latent_space.png", "Latent space", "posterior means of held-out images"),
    ("report/latents.png", "What the latents do", "information, aggregate posterior, spectrum"),
    ("report/manifold.png", "The plane of two latents", "decoded over [-3, 3] x [-3, 3]"),
    ("report/stochastic.png", "One image, seven draws", "an image and draws from its posterior, decoded"),
    (
        "report/traversal.gif",
        "Traversals",
        "a row is an image, a column one latent, three deviations either way",
    ),
    ("report/interpolation.gif", "Interpolations", "on straight lines between held-out images' latents"),
    ("report/interpolation.png", "Interpolations, still", "a row is one way between two held-out images"),
    ("report/nearest.png", "Nearest training images", "the samples most like a training image, over it"),
)


def show(run: RunFolder, recipe: Recipe) -> "Shown":
    """What the page shows of a run. Raises InputError where a file of numbers cannot be read."""
    from shared.show import page

    newest = newest_model(run, recipe)
    metrics = measured(run, newest)
    latents = disk.read_json(run.report / "doctor.json", "make it anew with doctor") or {}
    if latents.pop("model", None) not in (None, model_of(newest)):  # earlier versions did not say which
        latents = {key: value for key, value in latents.items() if recipe.stage2 and key != "stage2"}
    of_samples = latents.get("stage2", {}).get("verdicts", [])
    return page.Shown(
        name=run.path.name,
        folder=str(run),
        recipe=config.dump(recipe),
        settings=config.flatten(recipe),
        pictures=pictures(run),
        logs={"stage 1": run.stage("stage1").metrics, "stage 2": run.stage("stage2").metrics},
        numbers=page.numbers(metrics, latents),
        warnings=[line for line in (latents.get("collapse"), *of_samples) if line],
    )


def pictures(run: RunFolder) -> list[tuple[Path, str, str]]:
    """Those that are there."""
    found = []
    for name, title, words in PICTURES:
        path = run.path / name
        if path.is_dir():
            path = max(path.glob("*.png"), default=path)
        if path.is_file():
            found.append((path, title, words))
    return found


def main() -> None:
    parser = config.Parser(
        prog="python -m shared.report", description="One HTML page of one or several runs."
    )
    parser.add_argument("--run", nargs="+", metavar="RUN", help="run folders (the newest by default)")
    parser.add_argument("--out", metavar="FILE", help="where to write the page")
    options = parser.parse_args()
    runs = [open_run(run) for run in options.run or [None]]
    try:
        from shared.show.page import page

        html = page([show(run, recipe) for run, recipe in runs])
    except ImportError as error:
        cure = "pip install 'latent-stack[metrics]'"
        raise InputError(f"the report needs {error.name}: {cure}") from None
    name = "report.html" if len(runs) == 1 else "comparison.html"
    out = Path(options.out or runs[0][0].report / name)
    disk.check_writable(out.parent)
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; name a file")
    disk.write_text(out, html)
    config.say(f"report: {out} ({len(html) / 1e6:.1f} MB, needs nothing else)")


if __name__ == "__main__":
    config.run(main)
