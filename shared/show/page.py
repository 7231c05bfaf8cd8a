"""One self-contained HTML page of one or several runs: pictures, curves, tables. Needs no network.

Does not depend on where a run keeps its files: it is handed paths, numbers and text.
"""

import base64
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import flatten

TEMPLATE = Path(__file__).parent / "report.html.jinja"
KINDS = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}
POINTS = 300  # of a curve
# which numbers lead the table and the trade-off, best first
LEADING = (
    "reconstruction.mse", "reconstruction.psnr", "reconstruction.ssim", "reconstruction.weighted_mse",
    "reconstruction.kl", "reconstruction.active_units", "rfid", "samples.fid", "samples.kid",
    "latents.probe.kid",
)  # fmt: skip
NOT_DRAWN = ("mean_image_mse", "reconstruction_variance")
NOT_COMPARED = ("name", "run_dir", "tracking")

Series = dict[str, tuple[list, list]]  # key -> (steps, values)


@dataclass
class Shown:
    """What the page shows of one run.

    Arguments:
        name, folder: what the run is called, and where it stands.
        recipe: its YAML, and as flat keys.
        pictures: (file, title, what it shows), of those that are there.
        logs: {title of a stage: its metrics.jsonl}.
        numbers: every number that was measured, flat.
        warnings: a collapse, and what is wrong with samples, in words.
    """

    name: str
    folder: str
    recipe: str
    settings: dict[str, Any]
    pictures: list[tuple[Path, str, str]]
    logs: dict[str, Path]
    numbers: dict[str, Any]
    warnings: list[str]


def page(runs: Sequence[Shown]) -> str:
    """The HTML of runs side by side; where three or more differ in one number, its trade-off is drawn."""
    import jinja2

    tables = [run.numbers for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    differing, trade_off = compare([run.settings for run in runs], tables)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        runs=[_section(run) for run in runs],
        rows={name: [_brief(table.get(name, "")) for table in tables] for name in names},
        differing={key: [str(value) for value in values] for key, values in differing.items()},
        trade_off=trade_off,
    )


def _section(run: Shown) -> dict[str, Any]:
    """A run as the template reads it."""
    pictures = [
        {"title": title, "words": words, "uri": embedded(path.read_bytes(), path.suffix)}
        for path, title, words in run.pictures
    ]
    return {
        "name": run.name,
        "folder": run.folder,
        "recipe": run.recipe,
        "pictures": pictures,
        "curves": curves(run.logs),
        "warnings": run.warnings,
        "measured": bool(run.numbers),
    }


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def embedded(content: bytes, suffix: str) -> str:
    """A picture as a data URI."""
    return f"data:{KINDS[suffix]};base64,{base64.b64encode(content).decode()}"


def drawing(figure: Any) -> str:
    """A matplotlib figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return embedded(buffer.getvalue(), ".svg")


# ---------------------------------------------------------------- curves


def read_log(path: Path) -> Series:
    """{key: (steps, values)} of a stage's metrics.jsonl."""
    series: Series = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that is writing just now
            continue
        step = entry.pop("step")
        for key, value in entry.items():
            if value is not None and math.isfinite(value):
                steps, values = series.setdefault(key, ([], []))
                if steps and steps[-1] == step:  # measured again, after a stop
                    values[-1] = value
                else:
                    steps.append(step)
                    values.append(value)
    return series


def curves(logs: Mapping[str, Path]) -> str | None:
    """The curves of all stages, each quantity with a training and a held-out line; None if there are none."""
    from shared.show import plots

    groups = {}
    for title, path in logs.items():
        series = read_log(path)
        keys = [key.split("/", 1) for key in series]
        for name in dict.fromkeys(rest[0] for kind, *rest in keys if kind in ("loss", "val")):
            group = _lines_of(name, series)
            drawn = name not in NOT_DRAWN and not name.startswith("t0")
            if drawn and any(len(steps) > 1 for steps, _ in group.values()):
                groups[f"{title}: {name}"] = group
    return drawing(plots.curves(groups)) if groups else None


def _lines_of(name: str, series: Series) -> Series:
    """The training and the held-out line of a quantity, where it has them."""
    training = f"train/{name}" if f"train/{name}" in series else f"loss/{name}"
    lines = {"training": training, "held out": f"val/{name}"}
    return {words: _thinned(*series[key]) for words, key in lines.items() if key in series}


def _thinned(steps: list, values: list) -> tuple[list, list]:
    """At most POINTS points, each the mean of a stretch."""
    size = -(-len(steps) // POINTS)
    stretches = [slice(start, start + size) for start in range(0, len(steps), size)]
    return [steps[part][-1] for part in stretches], [statistics.fmean(values[part]) for part in stretches]


# ---------------------------------------------------------------- numbers


def numbers(metrics: dict[str, Any], latents: dict[str, Any]) -> dict[str, Any]:
    """Every number that evaluate and doctor wrote, flat, the leading ones first; lists are left out."""
    twice = ("mse", "mean_image_mse", "active_units")  # which evaluate measures, too
    latents = {key: value for key, value in latents.items() if key not in twice}
    flat = flatten(metrics | ({"latents": latents} if latents else {}))
    kept = {key: value for key, value in flat.items() if value is not None and not isinstance(value, list)}
    order = {key: place for place, key in enumerate(LEADING)}
    return dict(sorted(kept.items(), key=lambda item: order.get(item[0], len(order))))


def compare(
    settings: Sequence[Mapping[str, Any]], tables: Sequence[Mapping[str, Any]]
) -> tuple[dict, str | None]:
    """The keys in which recipes differ, {key: values}, and, if it is one number, the trade-off's drawing."""
    from shared.show import plots

    flats = [
        {key: value for key, value in flat.items() if key.split(".")[0] not in NOT_COMPARED}
        for flat in settings
    ]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    columns = {key: [flat.get(key) for flat in flats] for key in keys}
    differing = {key: values for key, values in columns.items() if len(set(map(str, values))) > 1}
    if len(differing) != 1 or len(settings) < 3:
        return differing, None
    ((key, raw),) = differing.items()
    values = [_as_number(value) for value in raw]
    columns = {name: [table.get(name) for table in tables] for name in LEADING}
    rows = {
        name: row for name, row in columns.items() if all(isinstance(value, (int, float)) for value in row)
    }
    if None in values or not rows:
        return differing, None
    order = sorted(range(len(values)), key=lambda i: values[i])
    rows = {name: [row[i] for i in order] for name, row in rows.items()}
    ordered = [values[i] for i in order]
    best = None
    if "samples.kid" in rows:
        best = ordered[sweet_spot([tables[i] for i in order])]
    return differing, drawing(plots.trade_off(key, ordered, rows, best))


def _as_number(value: Any) -> Any:
    """A recipe's value as a number to compare by: a latent shape is its dz. None where it is none."""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return math.prod(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def sweet_spot(tables: Sequence[Mapping[str, Any]]) -> int:
    """Of runs whose samples' KID is within its deviation of the best: the one whose latents carry least."""
    best = min(tables, key=lambda table: table["samples.kid"])
    bound = best["samples.kid"] + best["samples.kid_deviation"]
    good = [i for i, table in enumerate(tables) if table["samples.kid"] <= bound]
    return min(good, key=lambda i: tables[i].get("reconstruction.kl", 0.0))
