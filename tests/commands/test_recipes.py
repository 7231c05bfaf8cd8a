"""Every recipe in configs/ is whole: it loads, its networks can be built, and its first line is the command
that runs it."""

import math
import re

import pytest
import torch
import yaml

from shared import config
from shared import recipe as recipe_module
from shared.config import InputError
from shared.data.config import source_kind
from shared.recipe import CONFIGS, Recipe
from stage1_vae.pretrained import make_vae
from stage2_diffusion.config import Stage2Config
from stage2_diffusion.unet import make_unet
from tests.conftest import call

RECIPES = sorted(CONFIGS.glob("*.yaml"))


def test_the_recipes_are_there():
    assert {p.stem for p in RECIPES} >= {"digits", "fashion_mnist", "mnist", "deep_vae_128", "your_images"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_whole(path):
    recipe = config.load(Recipe, path)
    assert recipe.name == path.stem
    if recipe.data.source != "your_images":
        source_kind(recipe.data)
    model = recipe.stage1.model
    with torch.device("meta"):
        vae = make_vae(model, recipe.data)
        x = torch.empty(1, recipe.data.channels, recipe.data.image_size, recipe.data.image_size)
        z = vae.encode(x).latent_dist.mean
        assert z.shape == (1, *model.latent_shape) and vae.decode(z).sample.shape == x.shape
        if recipe.stage2:
            unet = make_unet(recipe.stage2.unet, tuple(model.latent_shape), 10)
            assert unet(z, 0, class_labels=torch.zeros(1, dtype=torch.long)).sample.shape == z.shape


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_first_lines_say_how_it_was_run(path):
    head = re.match(r"(#.*\n)+", path.read_text()).group()
    assert re.search(
        r"\./launch\.sh (sweep )?" + ("demo" if path.stem == "digits" else f"configs/{path.name}"), head
    )
    if path.stem != "your_images":
        assert re.search(r"\d+ (minutes|seconds)", head) and "cores" in head, "machine and time"


def test_the_template_is_printed_from_the_schema(capsys):
    call(recipe_module.main, "--template")
    assert capsys.readouterr().out == (CONFIGS / "your_images.yaml").read_text()


def test_every_key_stands_in_the_template_with_its_default_and_its_help():
    text = (CONFIGS / "your_images.yaml").read_text()
    written = config.flatten(yaml.safe_load(text))
    default = config.flatten(Recipe(name="x", stage2=Stage2Config()))
    assert written.keys() == default.keys()
    chosen = {key for key in written if written[key] != default[key]}
    weights = {f"stage1.loss_weights.{term}" for term in ("l1", "mse", "kl", "adversarial")}
    rhythm = {f"{stage}.{key}" for stage in ("stage1", "stage2") for key in ("max_steps", "batch_size")}
    begins = {f"stage1.discriminator.{key}" for key in ("start_step", "ramp_steps")}
    sampling = {f"sampling.{key}" for key in ("num_steps", "shift", "unconditional_guide")}
    denoiser = {"stage2.guide_at", "stage2.optim.lr"}
    assert chosen == {"name"} | weights | rhythm | begins | denoiser | sampling
    assert all("  # " in line for line in text.splitlines() if not line.startswith("#"))


def test_a_recipe_of_three_lines_is_enough(tmp_path):
    """What is left out has a value that fits the rest."""
    path = tmp_path / "short.yaml"
    path.write_text("name: short\nstage1: {max_steps: 10, loss_weights: {l1: 1}}\nstage2: {max_steps: 10}\n")
    recipe = config.load(Recipe, path)
    assert recipe.stage1.model.latent_shape == [16, 8, 8] and recipe.data.image_size == 64
    with pytest.raises(InputError, match="data.source: no such file or folder: your_images"):
        source_kind(recipe.data)


def test_deep_vae_128_is_the_user_s_model():
    recipe = config.load(Recipe, CONFIGS / "deep_vae_128.yaml")
    stage, weights = recipe.stage1, recipe.stage1.loss_weights
    assert (recipe.data.image_size, recipe.data.channels, stage.model.head) == (128, 3, "linear")
    assert math.prod(stage.model.latent_shape) == 512
    assert len(stage.model.channels) == 4 and stage.model.activation == "silu" and stage.optim.lr == 1e-4
    assert (weights.l1, weights.lpips, weights.kl) == (1.0, 1.0, 0.02) and stage.optim.clip_grad_norm > 0
    with torch.device("meta"):
        assert 11e6 < make_vae(stage.model, recipe.data).num_parameters() < 13e6


def test_a_sweep_is_one_line_of_overrides_for_each_run(capsys):
    path, key = CONFIGS / "mnist_latents.yaml", "stage1.model.latent_shape"
    call(recipe_module.main, path, "--sweep", f"{key}=[2,1,1],[16,1,1]", "seed=3", "data.source=digits")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        [
            f"{key}=[{dz},1,1]",
            f"run_dir=runs/mnist_latents-latent_shape-{dz}_1_1",
            "seed=3",
            "data.source=digits",
        ]
        for dz in (2, 16)
    ]


def test_a_sweep_names_its_folders_apart(capsys):
    call(
        recipe_module.main,
        CONFIGS / "digits.yaml",
        "run_dir=there/mine",
        "stage2.time.mean=2",
        "--sweep",
        "stage2.time.mean=-0.5,0,0.5",
    )
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == [
        f"run_dir=there/mine-stage2-mean-{value}" for value in ("-0.5", "0", "0.5")
    ]
    assert all(len(line) == 2 for line in lines), (
        "neither the user's run_dir nor another value overrides them"
    )


@pytest.mark.parametrize(
    "sweep, words",
    [
        ("", "a sweep reads"),
        ("seed=1,1", "two of the values are the same"),
        ("stage1.loss_weights.kl", "a sweep reads"),
        ("stage1.loss_weights.kl=1", "at least two"),
        ("seed=1,x", "seed"),
        ("stage1.loss_weights.k=1,2", "Did you mean"),
    ],
)
def test_a_wrong_sweep_is_one_line(sweep, words):
    with pytest.raises(InputError, match=words):
        call(recipe_module.main, CONFIGS / "digits.yaml", "--sweep", sweep)
