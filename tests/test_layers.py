"""The shape of the source: which way imports point, what is banned, how long a function may be."""

import ast
import re

import pytest

from tests.conftest import ROOT

SOURCES = sorted(p for folder in ("shared", "stage1_vae", "stage2_diffusion") for p in (ROOT / folder).glob("*.py"))
NAMES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in SOURCES if p.name != "__init__.py"}

SCHEMAS = {"stage1_vae.config", "stage2_diffusion.config"}
GROUND = {
    "shared.config", "shared.data_config", "shared.train_config", "shared.losses", "shared.transforms", "shared.keyed", "shared.simulate",
    "shared.domain",
}  # fmt: skip
SERVICES = {
    "shared.data", "shared.latents", "shared.optim", "shared.ema", "shared.checkpoint", "shared.tracker", "shared.engine",
    "shared.metrics", "shared.pictures", "shared.features", "shared.plots",
}  # fmt: skip
MATHEMATICS = {
    "stage1_vae.model", "stage1_vae.losses", "stage1_vae.kl", "stage1_vae.diagnostics", "stage1_vae.discriminator",
    "stage2_diffusion.unet", "stage2_diffusion.diffusion", "stage2_diffusion.sampling", "shared.pipeline",
}  # fmt: skip
RECIPE = {"shared.recipe"}
STAGES = {"stage1_vae.stage", "stage2_diffusion.stage", "shared.trained"}
ENTRIES = {
    "stage1_vae.train", "stage1_vae.encode", "stage2_diffusion.train",
    "shared.generate", "shared.evaluate", "shared.doctor", "shared.report",
}  # fmt: skip
LAYERS = [GROUND, SCHEMAS, SERVICES, MATHEMATICS, RECIPE, STAGES, ENTRIES]


def imports(path) -> set[str]:
    """The modules of ours that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{path.parent.name}.{node.module}" if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found & NAMES.keys()


def layer(name: str) -> int:
    return next(i for i, members in enumerate(LAYERS) if name in members)


def test_every_file_has_a_layer():
    assert set().union(*LAYERS) == NAMES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    for other in imports(NAMES[name]):
        same_package = name.split(".")[0] == other.split(".")[0]
        assert layer(other) < layer(name) or (layer(other) == layer(name) < len(LAYERS) - 1 and same_package), f"{name} imports {other}"


def test_model_files_can_be_lifted_out():
    assert imports(NAMES["stage1_vae.model"]) == set()
    assert imports(NAMES["shared.transforms"]) == set()


def test_schemas_do_not_import_torch():
    for name in SCHEMAS | RECIPE | {"shared.config", "shared.data_config", "shared.train_config"}:
        assert not re.search(r"^\s*(import|from) (torch|diffusers|accelerate)", NAMES[name].read_text(), re.MULTILINE), name


BANNED = r"\bpickle\b|torch\.load|(?<![.\w])eval\(|(?<![.\w])exec\(|yaml\.load\(|unsafe_load|trust_remote_code=True|allow_pickle=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_house_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a docstring says what the file is"
    calls = "\n".join(ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Call, ast.Import, ast.ImportFrom)))
    assert not re.search(BANNED, calls)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_no_file_hides_a_dependency():
    dependencies = {"datasets", "lpips", "wandb", "logging", "types", "torch", "diffusers", "accelerate", "einops", "yaml", "random"}
    assert not {p.stem for p in SOURCES} & dependencies


def test_the_top_level_is_fixed():
    allowed = {"pyproject.toml", "README.md", "stage1_vae", "stage2_diffusion", "shared", "configs", "tests", "launch.sh", "runs", "wandb"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert found <= allowed


def test_promises_name_tests_that_exist():
    table = (ROOT / "README.md").read_text().split("## What we promise")[1].split("\n## ")[0]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 40 and named <= defined, named - defined
