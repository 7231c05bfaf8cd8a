"""The shape of the source: which way imports point between the rooms, how long and wide things are, what is
banned."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from shared.sampling.folders import CODE, VAE_CODE
from tests.conftest import ROOT

PACKAGES = ("shared", "stage1_vae", "stage2_diffusion")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in SOURCES
    if path.name != "__init__.py"
}
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# From the ground up: a file imports from its own room and from those before it.
ROOMS = (
    "ground",
    "sampling",
    "show",
    "data",
    "formats",
    "training",
    "stages",
    "run",
    "measure",
    "planning",
    "commands",
)
RUN = {
    "shared.recipe",
    "shared.run",
    "shared.trained",
}  # what every command begins with; recipe is one itself


def is_command(name: str) -> bool:
    return 'if __name__ == "__main__":' in NAMES[name].read_text()


def room(name: str) -> str:
    """The room of a module, told by its folder."""
    package, *rest = name.split(".")
    if name in ("shared.config", "shared.disk", "shared.folders", "shared.cache") or rest[-1] == "config":
        return "ground"
    if name in RUN:
        return "run"
    if is_command(name):
        return "commands"
    return rest[0] if package == "shared" else "stages"


def imports(path: Path, function: str | None = None) -> set[str]:
    """The modules of ours that a file imports, wherever in the file or in one function of it; not those for
    the type checker alone."""
    found = set()
    tree: ast.AST = ast.parse(path.read_text())
    if function:
        tree = next(node for node in ast.walk(tree) if getattr(node, "name", None) == function)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*path.relative_to(ROOT).parent.parts, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found & NAMES.keys()


def wrong_arrows(name: str) -> list[str]:
    """The imports of a module that point up, into a command, or from one stage into the other."""
    wrong = []
    as_a_command = imports(NAMES[name], "main") if name in RUN and is_command(name) else set()
    for other in imports(NAMES[name]):
        here = ROOMS.index("commands" if other in as_a_command else room(name))
        there = ROOMS.index(room(other))
        package, other_package = name.split(".")[0], other.split(".")[0]
        sideways = room(name) == room(other) == "stages" and package != other_package
        if there > here or room(other) == "commands" or sideways:
            wrong.append(f"{name} ({room(name)}) imports {other} ({room(other)})")
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    assert room(name) in ROOMS
    assert not wrong_arrows(name)


def test_an_arrow_up_is_seen(monkeypatch, tmp_path):
    path = tmp_path / "shared" / "sampling" / "up.py"
    path.parent.mkdir(parents=True)
    path.write_text("from shared.training import ema\n")
    monkeypatch.setitem(NAMES, "shared.sampling.up", path)
    assert wrong_arrows("shared.sampling.up") == [
        "shared.sampling.up (sampling) imports shared.training.ema (training)"
    ]


CARRIED = {"torch", "numpy", "diffusers", "PIL"}  # what an export needs


def test_what_travels_in_an_export_can_be_lifted_out():
    assert imports(NAMES["stage1_vae.layers"]) == set()
    assert imports(NAMES["shared.sampling.transforms"]) == set()
    carried = {f"shared.sampling.{Path(name).stem}" for name in CODE}
    carried |= {f"stage1_vae.{Path(name).stem}" for name in VAE_CODE}
    for name in sorted(carried):
        assert imports(NAMES[name]) <= carried
        heads = {
            alias.split(".")[0]
            for alias in re.findall(r"^(?:from|import) ([a-z_0-9.]+)", NAMES[name].read_text(), re.MULTILINE)
        }
        assert heads - set(sys.stdlib_module_names) <= {*CARRIED, "", "shared"}, name


def test_one_module_is_imported_by_name():
    """An import that the arrows above do not see: the VAE's class, which an exported folder brings along
    itself."""
    found = [
        name
        for name, path in NAMES.items()
        if re.search(r"import_module\(f?\"(shared|stage)", path.read_text())
    ]
    assert found == ["shared.sampling.folders"]


def test_one_place_builds_a_pipeline_with_a_denoiser():
    calls = {
        name
        for name, path in NAMES.items()
        if "LatentDiffusionPipeline(" in path.read_text().split("class L")[0]
    }
    assert calls == {"shared.sampling.build", "stage1_vae.stage"}  # stage 1's has the VAE alone


def test_the_ground_and_what_checks_a_recipe_come_without_torch():
    light = [name for name in NAMES if room(name) == "ground"] + ["shared.recipe", "shared.run"]
    code = f"import sys; [__import__(name) for name in {light!r}]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------- house rules


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in SOURCES}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_room_can_be_read_in_one_sitting(folder):
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    commands = [path for path in files if 'if __name__ == "__main__":' in path.read_text()]
    assert len(files) - len(commands) <= 10 and len(commands) <= 10
    assert all(len(path.read_text().splitlines()) <= 350 for path in files)


BANNED = (
    r"\bpickle\b|torch\.load|(?<![.\w])eval\(|(?<![.\w])exec\(|yaml\.load\(|unsafe_load"
    r"|trust_remote_code=True|allow_pickle=True"
    r"|\.expanduser\(\)"  # which dies of a home that nobody has: disk.path_of
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_house_rules(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "a docstring says what the file is"
    assert not [n for n, line in enumerate(source.splitlines(), 1) if len(line) > 110]
    calls = "\n".join(
        ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Call, ast.Import, ast.ImportFrom))
    )
    assert not re.search(BANNED, calls)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.NamedExpr), f"line {node.lineno}: an assignment has a line of its own"
        if isinstance(node, ast.FunctionDef):
            most = 30 if node.name == "main" else 60
            assert node.end_lineno - node.lineno < most, f"{node.name} is too long"
            if not node.name.startswith("_") and path.name != "recipe.py":
                assert _is_explained(node, tree), f"{node.name} has no docstring"


def _is_explained(node: ast.FunctionDef, tree: ast.Module) -> bool:
    """Public functions of a module say what they do; methods and inner functions may speak for themselves."""
    return (
        node not in tree.body
        or node.name in ("main", "parse")
        or ast.get_docstring(node) is not None
        or _is_short(node)
    )


def _is_short(node: ast.FunctionDef) -> bool:
    return node.end_lineno - node.lineno < 8


def test_functions_are_short():
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert statistics.median(lengths) <= 10, statistics.median(lengths)


DIALECT = r"[Rr]efuses? to know|asleep|own youth|in the place of|\bso many\b|farewell"


@pytest.mark.parametrize(
    "path", [*SOURCES, ROOT / "README.md", ROOT / "launch.sh"], ids=lambda path: path.name
)
def test_plain_technical_english(path):
    assert not re.search(DIALECT, path.read_text())


MATHEMATICS = {
    "stage1_vae.losses": ["ms_ssim_term", "kl_weight", "kl_per_dimension", "kl_term", "effective_beta"],
    "stage1_vae.discriminator": ["hinge_loss"],
    "shared.training.similarity": ["psnr", "ssim"],
    "stage2_diffusion.diffusion": ["draw_times", "noised"],
    "shared.sampling.pipeline": ["predictor"],
    "shared.training.optim": ["learning_rate"],
    "shared.data.shard": ["statistics"],
}


@pytest.mark.parametrize(
    ("name", "function"), [(n, f) for n, functions in MATHEMATICS.items() for f in functions]
)
def test_mathematics_say_their_arguments(name, function):
    nodes = (
        node for node in ast.walk(ast.parse(NAMES[name].read_text())) if isinstance(node, ast.FunctionDef)
    )
    docstring = ast.get_docstring(next(node for node in nodes if node.name == function))
    assert "Arguments:" in docstring


def test_no_file_hides_a_dependency():
    dependencies = {
        "datasets",
        "lpips",
        "wandb",
        "logging",
        "types",
        "torch",
        "diffusers",
        "accelerate",
        "einops",
        "yaml",
        "random",
        "statistics",
    }
    assert not {path.stem for path in SOURCES} & dependencies


def test_the_top_level_is_fixed():
    allowed = {
        "pyproject.toml",
        "README.md",
        "stage1_vae",
        "stage2_diffusion",
        "shared",
        "configs",
        "tests",
        "launch.sh",
    }
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not listed:
        pytest.skip("no git checkout")
    assert {name.split("/")[0] for name in listed if not name.startswith(".")} <= allowed


@pytest.mark.slow
def test_the_type_checker_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_formatted_and_linted():
    for arguments in (["check", "."], ["format", "--check", *PACKAGES]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- promises and README


def test_promises_name_tests_that_exist():
    table = (ROOT / "tests" / "promises" / "README.md").read_text()
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(path.read_text() for path in TESTS), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 40 and named <= defined, named - defined


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
