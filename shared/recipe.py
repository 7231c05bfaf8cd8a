"""The whole recipe in one tree: data, both stages, sampling, tracking, and how they must fit each other.

`python -m shared.recipe CONFIG [key=value ...]` checks a recipe and prints its stages and its run folder, and
below how many images each stage computes at once, over all processes.
`--estimate` times a few steps and says what the whole takes on this machine.
`--sweep key=a,b,c` prints the overrides of each run of a sweep, `--template` a recipe with every key
explained. No torch.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared import config, disk
from shared.config import Contradictions, InputError, number, section, text
from shared.data.config import DataConfig, inspect_source
from shared.sampling.config import SAMPLERS, SamplingConfig
from shared.training.config import OptimConfig, TrackingConfig
from stage1_vae.config import MS_SSIM_WINDOW, DiscriminatorConfig, LossWeights, Stage1Config
from stage2_diffusion.config import Stage2Config

LPIPS_SIZES = {"vgg": 16, "alex": 31, "squeeze": 20}  # below these nothing is left after the last pooling
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass
class Recipe:
    """One YAML file: everything that a run depends on."""

    name: str = config.required(help="the run folder is runs/<name>")
    seed: int = number(
        0,
        low=0,
        high=2**31 - 1,
        help="weights at the start, order of the images, noise: the same seed, the same run",
    )
    run_dir: str | None = text(None, help="a run folder elsewhere")
    data: DataConfig = section(DataConfig, help="where the images come from and what they become")
    stage1: Stage1Config = section(Stage1Config, help="stage 1, the VAE")
    stage2: Stage2Config | None = config.optional(
        help="stage 2, the UNet on the VAE's latents; null: none, samples come from the VAE's prior"
    )
    sampling: SamplingConfig = section(SamplingConfig, help="how samples are drawn")
    tracking: TrackingConfig = section(
        TrackingConfig, help="where the log goes; metrics.jsonl is always written"
    )

    @property
    def run(self) -> Path:
        """The run folder: run_dir, or runs/<name>."""
        return disk.path_of(self.run_dir or f"runs/{self.name}")

    def contradictions(self) -> Contradictions:
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            yield "name", f"{self.name!r}: letters, digits, '_', '-' and '.' only (it names the run folder)"
        yield from self._model_contradictions()
        yield from self._loss_contradictions()
        if self.stage2:
            yield from self._stage2_contradictions(self.stage2)

    def _model_contradictions(self) -> Contradictions:
        """Whether the VAE fits the images; of a pretrained one, stage 1 finds that out."""
        model = self.stage1.model
        if model.pretrained:
            return
        depth = len(model.channels)
        for side in self.data.size:
            if side % 2**depth:
                reason = f"stage1.model.channels has {depth} stride-2 stages"
                yield "data.image_size", f"{side} is not divisible by {2**depth} ({reason})"
        grid = [side // 2**depth for side in self.data.size]
        if model.head == "conv":
            yield from _head_contradictions(model.latent_shape, grid)
        features = [model.channels[-1], *grid]
        if model.head == "identity" and model.latent_shape != features:
            yield "stage1.model.latent_shape", f"head: identity makes the features the latents: {features}"

    def _loss_contradictions(self) -> Contradictions:
        """Whether the terms of stage 1 can be computed on the images."""
        weights, size = self.stage1.loss_weights, min(self.data.size)
        least = 2 ** len(self.stage1.discriminator.channels)
        if weights.adversarial and size < least:
            cure = f"its strided convolutions need images of at least {least} px, not {size}"
            yield "stage1.discriminator.channels", cure
        if weights.ms_ssim and size < MS_SSIM_WINDOW:
            yield "stage1.loss_weights.ms_ssim", f"its window is {MS_SSIM_WINDOW} px wide, the images {size}"
        if weights.lpips:
            yield from self.lpips_contradictions()

    def lpips_contradictions(self) -> Contradictions:
        """What keeps LPIPS from being computed on these images, whether or not it is a term."""
        lpips = self.stage1.lpips
        shorter = min(self.data.size)
        size = lpips.crop or shorter
        if size > shorter:
            yield "stage1.lpips.crop", f"{size} px do not fit into images of {self.data.image_size}"
        least = LPIPS_SIZES[lpips.net]
        if size < least:
            yield (
                "stage1.lpips.net",
                f"{lpips.net} needs images (or a crop) of at least {least} px, not {size}",
            )
        if lpips.channels == "repeat" and self.data.channels not in (1, 3, 4):
            cure = "say each, or stage1.loss_weights.lpips: 0"
            yield (
                "stage1.lpips.channels",
                f"repeat is for 1, 3 or 4 channels, the images have {self.data.channels}: {cure}",
            )

    def _stage2_contradictions(self, stage2: Stage2Config) -> Contradictions:
        """Whether stage 2 fits the latents, and the sampling fits stage 2."""
        if not self.stage1.model.pretrained:
            yield from stage2.misfits(self.stage1.model.latent_shape)
        guided = self.sampling.guidance_scale != 1 and self.data.label_column
        of_the_class = stage2.guide_at and not self.sampling.unconditional_guide
        if guided and not (stage2.label_dropout or of_the_class):
            cure = "set it to 0.1, guide_at to 0.16 (with unconditional_guide: false) or guidance_scale to 1"
            yield "stage2.label_dropout", f"at 0 there is nothing to guide away from: {cure}"
        fitting = SAMPLERS[stage2.objective]
        if self.sampling.sampler not in fitting:
            cure = f"does not fit objective {stage2.objective}; take {' or '.join(fitting)}"
            yield "sampling.sampler", f"{self.sampling.sampler} {cure}"
        if self.sampling.shift != 1 and stage2.objective != "flow":
            cure = f"moves the steps of objective flow; of {stage2.objective} set it to 1"
            yield "sampling.shift", cure


def _head_contradictions(latent_shape: list[int], grid: list[int]) -> Contradictions:
    """Whether a convolutional head makes latents (c,h,w) of features on a grid [height, width]."""
    channels, *sides = latent_shape
    fold = grid[0] // sides[0]
    if fold < 1 or [side * fold for side in sides] != grid:
        cure = f"head: conv leaves {grid} pixels, or folds them, not {sides} (head: linear takes any)"
        yield "stage1.model.latent_shape", cure
    elif channels % fold**2:
        yield "stage1.model.latent_shape", f"{fold}x{fold} pixels fold into a multiple of {fold**2} channels"


# ---------------------------------------------------------------- from the command line to a recipe


def load(path: str | Path, overrides: Sequence[str] = (), needs_images: bool = True) -> Recipe:
    """A checked recipe, its source looked at where images are needed. Raises InputError."""
    recipe = config.load(Recipe, path, overrides)
    if needs_images:
        inspect_source(recipe.data)
    return recipe


def load_for_training(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """As `load`; stage 2 on latents from elsewhere needs no images."""
    recipe = load(path, overrides, needs_images=False)
    if not (recipe.stage2 and recipe.stage2.latents):
        inspect_source(recipe.data)
    return recipe


def without_places(recipe: Recipe) -> Recipe:
    """The recipe without the folders of the machine that it ran on: of each its name is left."""
    stage1, stage2 = recipe.stage1, recipe.stage2
    stage1 = replace(
        stage1,
        init=_name(stage1.init),
        lpips=replace(stage1.lpips, weights=_name(stage1.lpips.weights)),
        model=replace(stage1.model, pretrained=_name(stage1.model.pretrained)),
    )
    stage2 = stage2 and replace(stage2, init=_name(stage2.init), latents=_name(stage2.latents))
    data = replace(recipe.data, source=_name(recipe.data.source))
    return replace(recipe, run_dir=None, data=data, stage1=stage1, stage2=stage2)


def _name(place: str | None) -> Any:
    """A file's or a folder's name; a hub id as it is."""
    here = place is not None and (disk.path_of(place).exists() or place.startswith(("/", "~", ".")))
    return Path(place).name if here and place else place


def check_overrides(overrides: Sequence[str]) -> None:
    """Types and ranges of `key.sub=value` overrides, each by itself. Raises InputError."""
    config.load(Recipe, CONFIGS / "digits.yaml", overrides, alone=True)


def parse_config(description: str, needs_images: bool = True) -> tuple[Recipe, bool]:
    """The command line of both train commands: a recipe, digits by default, and whether to try it only."""
    parser = config.Parser(description=description)
    parser.add_argument("--config", help="a recipe, such as configs/digits.yaml (the default)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    parser.add_argument(
        "--dry-run", action="store_true", help="one step, validation, save and four samples; leaves nothing"
    )
    options = parser.parse_intermixed_args()
    if options.config is None:
        options.config = CONFIGS / "digits.yaml"
        config.say(f"no --config given: taking {options.config}")
    return load(options.config, options.overrides, needs_images), options.dry_run


def sweep(path: str, wanted: str, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a sweep `key=a,b,c`: one value, and a run folder named after it.

    Commas in brackets stay. Raises InputError.
    """
    key, equals, listed = wanted.partition("=")
    values = re.split(r",(?![^\[{]*[\]}])", listed)
    if not equals or len(values) < 2:
        raise InputError(f"{wanted!r}: a sweep reads key.sub=a,b,c with at least two values")
    base = load_for_training(path, [f"{key}={values[0]}", *overrides]).run
    names = [re.sub(r"[^\w.-]+", "_", value).strip("_") for value in values]
    if len(set(names)) < len(names):
        raise InputError(f"{wanted!r}: two of the values are the same")
    last = key.rsplit(".", 1)[-1]
    if key.startswith("stage2."):  # many of its keys stage 1 has, too
        last = f"stage2-{last}"
    others = [override for override in overrides if override.partition("=")[0] not in (key, "run_dir")]
    runs = zip(values, names, strict=True)
    return [[f"{key}={value}", f"run_dir={base}-{last}-{name}", *others] for value, name in runs]


TEMPLATE_HEAD = """\
# ./launch.sh configs/your_images.yaml data.source=DIR
#
# A template: every key, what it may be and what it means, as `python -m shared.recipe --template` prints it.
# A recipe that leaves a key out gets the value that stands here; but a name and max_steps have to be given,
# loss weights are 0, the adversarial term begins at step 0 and at once, batches are of 64, stage 2 has a rate
# of 0.004 and no guide, which would be told the class, samples take 10 steps that are not shifted, and
# without `stage2:` there is no stage 2.
# Copy it, or change it from the command line:
#   ./launch.sh configs/your_images.yaml data.source=~/Pictures/cats name=cats stage2.max_steps=20000
# As it stands: 64 px colour images, latents of 4x16x16 folded to 16x8x8; more steps are better. Two cores of
# an AMD EPYC (AVX-512, bf16), no GPU: 27 minutes from the command to the report, tests beside it at times, on
# 3,781 photos of clothes in ten classes: KID 0.049 +- 0.004, precision 0.28, recall 0.39 (500 samples, 189
# held-out photos; one run). photos_64.yaml is this with flips, and not told apart from it. At 32 px take
# 'stage1.model.latent_shape=[16,4,4]'.
"""


def template() -> str:
    """A recipe with every key explained: the defaults, and what no default can say for every image set."""
    stage1 = Stage1Config(
        loss_weights=LossWeights(l1=1.0, mse=1.0, kl=0.01, adversarial=0.05),
        discriminator=DiscriminatorConfig(start_step=770, ramp_steps=200),
        batch_size=32,
        max_steps=2600,
    )
    faster = OptimConfig(lr=6e-3)
    stage2 = Stage2Config(guide_at=0.16, optim=faster, batch_size=128, max_steps=1650)
    sampling = SamplingConfig(num_steps=8, shift=2.0, unconditional_guide=True)
    recipe = Recipe(name="your_images", stage1=stage1, stage2=stage2, sampling=sampling)
    return TEMPLATE_HEAD + "".join(f"{line}\n" for line in config.template(recipe))


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.recipe", description="Check a recipe; print its stages and its run folder."
    )
    parser.add_argument("config", nargs="?", help="a recipe, such as configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument(
        "--sweep", metavar="key=a,b,c", help="the overrides of one run per value, a line each"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="time a few steps; say parameters, disk and time of all steps"
    )
    parser.add_argument("--template", action="store_true", help="a recipe with every key explained")
    options = parser.parse_intermixed_args()
    if options.config is None and not options.template:
        parser.error("name a recipe, or --template")
    return options


def main() -> None:
    options = parse()
    if options.template:
        print(template(), end="")
    elif options.sweep is not None:
        lines = sweep(options.config, options.sweep, options.overrides)
        for line in lines:  # every run is checked before the first is begun
            load_for_training(options.config, line)
        print("\n".join("\t".join(line) for line in lines))
    elif options.estimate:
        from shared.measure.estimate import estimate

        estimate(load_for_training(options.config, options.overrides))
    else:
        recipe = load_for_training(options.config, options.overrides)
        stages = [recipe.stage1, recipe.stage2] if recipe.stage2 else [recipe.stage1]
        kind = "both" if recipe.stage2 else "stage1"
        print("stage2" if recipe.stage2 and recipe.stage2.latents else kind, recipe.run)
        print(*(stage.batch_size // stage.grad_accumulation for stage in stages))


if __name__ == "__main__":
    config.run(main)
