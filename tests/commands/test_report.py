"""The page: everything in one file, nothing asked of the network, several runs side by side, readable at
every width."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

from shared import disk, doctor, evaluate, report
from shared.config import InputError
from shared.run import RunFolder, model_of, newest_model, open_run
from shared.show import page
from tests.conftest import call


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Three runs that differ in one number, with everything that the commands write."""
    from shared import generate

    folder = tmp_path_factory.mktemp("runs")
    made = []
    for beta in ("0.02", "0.2", "2.0"):
        run = folder / f"kl-{beta}"
        shutil.copytree(trained, run, ignore=shutil.ignore_patterns("report"))
        (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("kl: 0.02", f"kl: {beta}"))
        made.append(run)
    call(generate.main, "--run", made[0])
    call(evaluate.main, "--run", made[0], "--num-images", "8")
    call(doctor.main, "--run", made[0])
    for run in made[1:]:
        shutil.copytree(made[0] / "report", run / "report")
        found = json.loads((run / "report" / "metrics.json").read_text())
        found["samples"]["fid"] *= 2
        (run / "report" / "metrics.json").write_text(json.dumps(found))
    return made


def test_one_run(runs):
    call(report.main, "--run", runs[0])
    html = (runs[0] / "report" / "report.html").read_text()
    assert (
        "Samples" in html
        and "Reconstructions" in html
        and "reconstruction.psnr" in html
        and "loss_weights" in html
    )
    sources = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(sources) > 6 and all(source.startswith("data:image/") for source in sources), (
        "nothing from elsewhere"
    )
    assert "<script" not in html


def test_verdicts_on_an_older_network_are_not_shown(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    file = tmp_path / "run" / "report" / "doctor.json"
    found = json.loads(file.read_text())
    found["stage2"]["verdicts"] = ["undertrained: so it was"]
    for model, shown in ((found["model"], True), ("another", False)):
        file.write_text(json.dumps(found | {"model": model}))
        call(report.main, "--run", tmp_path / "run")
        html = (tmp_path / "run" / "report" / "report.html").read_text()
        assert ("undertrained: so it was" in html) is shown


def test_nor_is_the_collapse_of_an_older_vae_alone(runs, tmp_path):
    run, recipe = open_run(runs[0])
    recipe = dataclasses.replace(recipe, stage2=None)
    run = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    model = model_of(newest_model(run, recipe))
    for made_of, warnings in ((model, ["collapsed"]), ("another", [])):
        disk.write_json(run.report / "doctor.json", {"collapse": "collapsed", "model": made_of})
        assert report.show(run, recipe).warnings == warnings


def test_a_folder_is_no_page(runs, tmp_path):
    with pytest.raises(InputError, match="is a folder; name a file"):
        call(report.main, "--run", runs[0], "--out", tmp_path)


def test_several_runs_stand_side_by_side(runs, tmp_path):
    call(report.main, "--run", *runs, "--out", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "The trade-off" in html and all(run.name in html for run in runs)
    row = re.search(r"<td>stage1.loss_weights.kl</td>(.*?)</tr>", html).group(1)
    assert re.findall(r"<td>([^<]+)</td>", row) == ["0.02", "0.2", "2.0"]


def test_the_sweet_spot_is_the_leanest_of_the_best():
    measured = ((1.0, 50), (1.05, 20), (2.0, 5))
    tables = [
        {"samples.kid": kid, "samples.kid_deviation": 0.1, "reconstruction.kl": nats}
        for kid, nats in measured
    ]
    assert page.sweet_spot(tables) == 1
    assert page.sweet_spot([{**table, "samples.kid_deviation": 0.01} for table in tables]) == 0


def test_a_run_that_was_not_measured_says_how_to(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    call(report.main, "--run", tmp_path / "run")
    assert "shared.evaluate" in (tmp_path / "run" / "report" / "report.html").read_text()


def test_what_a_recipe_says_cannot_break_the_page(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "report").mkdir(exist_ok=True)
    (tmp_path / "run" / "report" / "doctor.json").write_text(
        json.dumps({"collapse": "<script>alert(1)</script>"})
    )
    call(report.main, "--run", tmp_path / "run")
    assert "<script" not in (tmp_path / "run" / "report" / "report.html").read_text()
    (tmp_path / "run" / "report" / "doctor.json").write_text("{half")
    with pytest.raises(InputError, match="doctor.json: unreadable; make it anew"):
        call(report.main, "--run", tmp_path / "run")


@pytest.mark.parametrize("width", [1440, 390])
def test_in_a_browser(runs, tmp_path, width):
    """Every picture is shown, and at no width does the page itself scroll sideways."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium here")
    inner = tmp_path / "page.html"
    call(report.main, "--run", *runs, "--out", inner)
    probe = (
        "<script>addEventListener('load', () => {"
        "const broken = [...document.images].filter(i => !i.naturalWidth).length;"
        "const wide = document.documentElement.scrollWidth;"
        "document.title = JSON.stringify([document.images.length, broken, wide, innerWidth]) })</script>"
    )
    frame = tmp_path / "frame.html"  # the browser's own window is never narrower than 500 pixels
    document = (inner.read_text() + probe).replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{document}" '
        'onload="document.title = this.contentDocument.title"></iframe>'
    )
    shown = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=8000",
            "--window-size=1600,1000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    images, broken, needed, there = json.loads(re.search(r"<title>(\[.*?\])</title>", shown).group(1))
    assert images > 15 and broken == 0
    assert there == width and needed <= width
