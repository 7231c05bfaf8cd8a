"""The package is whole: a wheel, installed away from the checkout, trains, generates and reports."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import shared
from tests.conftest import ROOT, clean_environment


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a fresh environment that has our wheel, and our dependencies from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("shared", "stage1_vae", "stage2_diffusion", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    environment = folder / "environment"
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, tree)
    run(sys.executable, "-m", "venv", environment)
    interpreter = environment / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", *folder.glob("*.whl"))
    own = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path in a .pth file brings modules, but not the .pth files beside them: not the checkout, which is
    # installed there.
    Path(own, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def run(*arguments, cwd="/") -> str:
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_trains_generates_and_reports(python, tmp_path):
    place = run(python, "-c", "import shared; print(shared.__file__)", cwd=tmp_path).strip()
    assert place.startswith(str(python.parents[1]))
    quick = ["stage1.max_steps=2", "stage2.max_steps=2", "stage1.mixed_precision=fp32", "run_dir=run"]
    run(
        python, "-m", "stage1_vae.train", *quick, cwd=tmp_path
    )  # without --config: the digits recipe is in the wheel
    run(python, "-m", "stage1_vae.encode", "--run", "run", cwd=tmp_path)
    run(python, "-m", "stage2_diffusion.train", *quick, cwd=tmp_path)
    run(python, "-m", "shared.generate", "--run", "run", "--num-images", "2", cwd=tmp_path)
    run(python, "-m", "shared.doctor", "--run", "run", cwd=tmp_path)
    run(python, "-m", "shared.report", "--run", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "samples" / "grid.png").is_file()
    assert "latent space" in (tmp_path / "run" / "report" / "report.html").read_text().lower()
    assert shared.__version__ in run(python, "-m", "shared.recipe", "--version", cwd=tmp_path)
