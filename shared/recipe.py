"""The whole recipe: data, stage 1, stage 2 and sampling in one tree, and the run folder it belongs to.

Knows how the parts must fit each other. Standard library and OmegaConf only.
`python -m shared.recipe CONFIG [key=value ...]` checks a recipe and prints its stages and its run folder.
`--sweep key=a,b,c` prints the overrides of each run of a sweep.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from shared import config
from shared.config import InputError, number
from shared.data.config import DataConfig, inspect_source
from shared.sampling.config import SamplingConfig
from shared.training.config import TrackingConfig
from stage1_vae.config import Stage1Config
from stage2_diffusion.config import SAMPLERS, Stage2Config

LPIPS_SIZES = {"vgg": 16, "alex": 31, "squeeze": 20}  # below these nothing is left after the last pooling
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass
class Recipe:
    """One YAML file: everything that a run depends on."""

    name: str
    seed: int = number(0, low=0, high=2**31 - 1)
    run_dir: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def run(self) -> Path:
        """The run folder: run_dir, or runs/<name>."""
        return Path(self.run_dir or f"runs/{self.name}").expanduser()

    def contradictions(self):
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            yield "name", f"{self.name!r}: letters, digits, '_', '-' and '.' only (it names the run folder)"
        yield from self._stage1_fits_the_images()
        if self.stage2:
            yield from self._stage2_fits_the_latents()

    def _stage1_fits_the_images(self):
        model, size, depth = self.stage1.model, self.data.image_size, len(self.stage1.model.channels)
        if size % 2**depth:
            yield "data.image_size", f"{size} is not divisible by {2**depth} (stage1.model.channels has {depth} stride-2 stages)"
        grid = [size // 2**depth] * 2
        if model.head == "conv" and model.latent_shape[1:] != grid:
            yield "stage1.model.latent_shape", f"head: conv leaves {grid} pixels, not {model.latent_shape[1:]} (head: linear takes any)"
        if model.head == "identity" and model.latent_shape != [model.channels[-1], *grid]:
            yield "stage1.model.latent_shape", f"head: identity makes the features the latents: {[model.channels[-1], *grid]}"
        if self.stage1.loss_weights.adversarial and size < (least := 2 ** len(self.stage1.discriminator.channels)):
            yield "stage1.discriminator.channels", f"so many strided convolutions need images of at least {least} px, not {size}"
        if self.stage1.loss_weights.ms_ssim and size < 11:
            yield "stage1.loss_weights.ms_ssim", f"its window is 11 px wide, the images {size}"
        if self.stage1.loss_weights.lpips:
            yield from self.lpips_contradictions()

    def lpips_contradictions(self):
        """What keeps LPIPS from being computed on these images, whether or not it is a term."""
        size = self.stage1.lpips.crop or self.data.image_size
        if size > self.data.image_size:
            yield "stage1.lpips.crop", f"{size} px do not fit into images of {self.data.image_size}"
        if size < (least := LPIPS_SIZES[self.stage1.lpips.net]):
            yield "stage1.lpips.net", f"{self.stage1.lpips.net} needs images (or a crop) of at least {least} px, not {size}"
        if self.stage1.lpips.channels == "repeat" and self.data.channels not in (1, 3):
            cure = "say each, or stage1.loss_weights.lpips: 0"
            yield "stage1.lpips.channels", f"repeat is for 1 or 3 channels, the images have {self.data.channels}: {cure}"

    def _stage2_fits_the_latents(self):
        _, height, width = self.stage1.model.latent_shape
        halvings = 2 ** (len(self.stage2.unet.channels) - 1)
        if height % halvings or width % halvings:
            yield "stage2.unet.channels", f"latents of {height}x{width} cannot be halved {len(self.stage2.unet.channels) - 1} times"
        if not (self.stage2.label_dropout or self.stage2.guide_at) and self.sampling.guidance_scale != 1 and self.data.label_column:
            yield "stage2.label_dropout", "0 leaves guidance nothing to lean on: set it to 0.1, guide_at to 0.15 or guidance_scale to 1"
        if self.sampling.sampler not in (fitting := SAMPLERS[self.stage2.objective]):
            yield "sampling.sampler", f"{self.sampling.sampler} does not fit objective {self.stage2.objective}; take {' or '.join(fitting)}"


# ---------------------------------------------------------------- from the command line to a recipe


def load(path, overrides: list[str] = (), needs_images: bool = True) -> Recipe:
    """A checked recipe, its source looked at where images are needed. Raises InputError."""
    recipe = config.load(Recipe, path, overrides)
    if needs_images:
        inspect_source(recipe.data)
    return recipe


def parse_config(description: str, needs_images: bool = True) -> Recipe:
    """The command line of both train commands: `--config CONFIG [key=value ...]`, digits when nothing is named."""
    parser = config.Parser(description=description)
    parser.add_argument("--config", help="a recipe, such as configs/digits.yaml (the default)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the recipe")
    options = parser.parse_args()
    if options.config is None:
        options.config = CONFIGS / "digits.yaml"
        config.say(f"no --config given: taking {options.config}")
    return load(options.config, options.overrides, needs_images)


# ---------------------------------------------------------------- the recipe in its run folder


def _sweep(path: str, sweep: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of each run of a sweep `key=a,b,c`: one value, and a run folder named after it. Commas in brackets stay."""
    key, equals, values = sweep.partition("=")
    values = re.split(r",(?![^\[{]*[\]}])", values)
    if not equals or len(values) < 2:
        raise InputError(f"{sweep!r}: a sweep reads key.sub=a,b,c with at least two values")
    base = load(path, [f"{key}={values[0]}", *overrides]).run
    names = [re.sub(r"[^\w.-]+", "_", value).strip("_") for value in values]
    if len(set(names)) < len(names):
        raise InputError(f"{sweep!r}: two of the values are the same")
    others = [override for override in overrides if not override.startswith("run_dir=")]
    return [
        [f"{key}={value}", f"run_dir={base}-{key.rsplit('.', 1)[-1]}-{name}", *others] for value, name in zip(values, names, strict=True)
    ]


def main() -> None:
    """Print the stages and the run folder; of a sweep, a line of overrides for each run, every one of them checked first."""
    parser = config.Parser(prog="python -m shared.recipe", description="Check a recipe; print its stages and its run folder.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--sweep", metavar="key=a,b,c", help="one run per value")
    options = parser.parse_intermixed_args()
    if options.sweep is not None:
        lines = _sweep(options.config, options.sweep, options.overrides)
        for line in lines:
            load(options.config, line)
        print("\n".join("\t".join(line) for line in lines))
        return
    recipe = load(options.config, options.overrides)
    print("both" if recipe.stage2 else "stage1", recipe.run)


if __name__ == "__main__":
    config.run(main)
