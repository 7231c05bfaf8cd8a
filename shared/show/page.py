"""One self-contained HTML page of one or several runs."""

import base64
import io
import json
import math
from pathlib import Path

from shared import config
from shared.config import InputError

POINTS = 300  # of a curve
# which numbers lead the table and the trade-off, best first
LEADING = (
    "reconstruction.mse", "reconstruction.psnr", "reconstruction.ssim", "reconstruction.weighted_mse", "reconstruction.kl",
    "reconstruction.active_units", "rfid", "samples.fid", "samples.kid", "latents.probe.kid",
)  # fmt: skip
NOT_DRAWN = ("mean_image_mse", "reconstruction_variance")
NOT_COMPARED = ("name", "run_dir", "tracking")
KINDS = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}
TEMPLATE = Path(__file__).parent / "report.html.jinja"
# file below the run folder, title, what it shows
PICTURES = (
    ("samples/grid.png", "Samples", "drawn by the finished model"),
    ("stage1_vae/previews", "Reconstructions", "held-out images over their reconstructions"),
    ("report/statistics.png", "The field's own statistics", "generated against held-out images"),
    ("report/reconstructions.gif", "Reconstructions over the training", "held-out images over their reconstructions"),
    ("report/latent_space.gif", "Latent space over the training", "held-out images, in the plane of the last checkpoint"),
    ("report/latent_space.png", "Latent space", "posterior means of held-out images"),
    ("report/latents.png", "What the latents do", "information, aggregate posterior, spectrum"),
    ("report/manifold.png", "The plane of two latents", "decoded over [-3, 3] x [-3, 3]"),
    ("report/stochastic.png", "One image, seven draws", "an image and reconstructions of draws from its posterior"),
    ("report/traversal.gif", "Traversals", "a row is an image, a column one latent, moved by three deviations either way"),
    ("report/interpolation.gif", "Interpolations", "on straight lines between the latents of held-out images"),
    ("report/interpolation.png", "Interpolations, still", "a row is one way between two held-out images"),
    ("report/nearest.png", "Nearest training images", "the samples most like a training image, over that image"),
)


def embedded(content: bytes, suffix: str) -> str:
    """A picture as a data URI."""
    return f"data:{KINDS[suffix]};base64,{base64.b64encode(content).decode()}"


def drawing(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return embedded(buffer.getvalue(), ".svg")


def _json(path: Path) -> dict:
    """What a command wrote into report/; nothing where it has not run. Raises InputError where it cannot be read."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise InputError(f"{path}: not readable; make it anew with evaluate or doctor") from None


def pictures(run: Path) -> list[dict]:
    """The pictures of a run that are there, as data URIs."""
    found = []
    for name, title, words in PICTURES:
        path = run / name
        if path.is_dir():
            path = max(path.glob("*.png"), default=path)
        if path.is_file():
            found.append({"title": title, "words": words, "uri": embedded(path.read_bytes(), path.suffix)})
    return found


def log(folder: Path) -> dict[str, tuple[list, list]]:
    """{key: (steps, values)} of a stage's metrics.jsonl."""
    series = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that is writing just now
            continue
        step = entry.pop("step")
        for key, value in entry.items():
            if value is not None and math.isfinite(value):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return series


def _thinned(steps: list, values: list) -> tuple[list, list]:
    """At most POINTS points, each the mean of a stretch."""
    size = -(-len(steps) // POINTS)
    stretches = range(0, len(steps), size)
    return [steps[min(i + size, len(steps)) - 1] for i in stretches], [sum(v := values[i : i + size]) / len(v) for i in stretches]


def curves(run: Path) -> str | None:
    """The curves of both stages, each quantity with its training and its held-out line."""
    from shared.show import plots

    groups = {}
    for folder, title in (("stage1_vae", "stage 1"), ("stage2_diffusion", "stage 2")):
        series = log(run / folder)
        for name in dict.fromkeys(key.split("/", 1)[1] for key in series if key.split("/")[0] in ("loss", "val")):
            training = next((key for key in (f"train/{name}", f"loss/{name}") if key in series), None)
            lines = {"training": training, "held out": f"val/{name}"}
            group = {words: _thinned(*series[key]) for words, key in lines.items() if key in series}
            if name not in NOT_DRAWN and not name.startswith("t0") and any(len(steps) > 1 for steps, _ in group.values()):
                groups[f"{title}: {name}"] = group
    return drawing(plots.curves(groups)) if groups else None


def numbers(run: Path) -> dict:
    """Every number that evaluate and doctor wrote, flat; lists are left out."""
    doctor = {
        key: value for key, value in _json(run / "report" / "doctor.json").items() if key not in ("mse", "mean_image_mse", "active_units")
    }
    flat = config.flatten(_json(run / "report" / "metrics.json") | ({"latents": doctor} if doctor else {}))
    kept = {key: value for key, value in flat.items() if value is not None and not isinstance(value, list)}
    order = {key: place for place, key in enumerate(LEADING)}
    return dict(sorted(kept.items(), key=lambda item: order.get(item[0], len(order))))


def _plain(value):
    """A recipe's value as a number to compare by: a latent shape is its dz. None where it is none."""
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        return math.prod(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def compare(recipes: list, tables: list[dict]) -> tuple[dict, str | None]:
    """The keys in which recipes differ, {key: values}, and the drawing of a trade-off where it is one number."""
    from shared.show import plots

    flats = [{k: v for k, v in config.flatten(recipe).items() if k.split(".")[0] not in NOT_COMPARED} for recipe in recipes]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    differing = {key: [flat.get(key) for flat in flats] for key in keys if len({str(flat.get(key)) for flat in flats}) > 1}
    if len(differing) != 1 or len(recipes) < 3:
        return differing, None
    ((key, values),) = differing.items()
    values = [_plain(value) for value in values]
    rows = {name: [table.get(name) for table in tables] for name in LEADING}
    rows = {name: row for name, row in rows.items() if all(isinstance(v, (int, float)) for v in row)}
    if None in values or not rows:
        return differing, None
    order = sorted(range(len(values)), key=values.__getitem__)
    rows = {name: [row[i] for i in order] for name, row in rows.items()}
    values = [values[i] for i in order]
    best = None if "samples.kid" not in rows else values[sweet_spot([tables[i] for i in order])]
    return differing, drawing(plots.trade_off(key, values, rows, best))


def sweet_spot(tables: list[dict]) -> int:
    """Of the runs whose samples' KID is within its deviation of the best, the one whose latents carry least."""
    best = min(tables, key=lambda table: table["samples.kid"])
    good = [i for i, table in enumerate(tables) if table["samples.kid"] <= best["samples.kid"] + best["samples.kid_deviation"]]
    return min(good, key=lambda i: tables[i].get("reconstruction.kl", 0.0))


def _shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def page(runs: list[tuple[Path, object]]) -> str:
    """The HTML of some runs and their recipes."""
    import jinja2

    tables = [numbers(run) for run, _ in runs]
    differing, trade_off = compare([recipe for _, recipe in runs], tables)
    rows = {key: [_shown(table.get(key, "")) for table in tables] for key in dict.fromkeys(key for table in tables for key in table)}
    shown = [
        {
            "name": run.name, "folder": str(run), "recipe": config.dump(recipe), "pictures": pictures(run), "curves": curves(run),
            "warning": _json(run / "report" / "doctor.json").get("collapse"), "measured": bool(tables[i]),
        }
        for i, (run, recipe) in enumerate(runs)
    ]  # fmt: skip
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    differing = {key: [str(value) for value in values] for key, values in differing.items()}
    return environment.from_string(TEMPLATE.read_text()).render(runs=shown, rows=rows, differing=differing, trade_off=trade_off)
