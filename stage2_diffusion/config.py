"""The schema of `stage2:`. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared.config import Contradictions, InputError, choice, number, section, text
from shared.sampling.config import SAMPLERS
from shared.training.config import TrainConfig

LEAST_VALIDATED = 16  # samples, and held-out images, of which a KID says something


@dataclass
class UNetConfig:
    """The denoiser, a diffusers UNet2DModel.

    One level per entry of `channels`, attention at `attention_levels`.
    """

    channels: list[int] = number(
        [96, 192], low=8, high=8192, help="one level each; each but the first halves the sides"
    )
    blocks_per_level: int = number(1, low=1, high=16, help="residual blocks of a level")
    attention_levels: list[int] = number(
        [], low=0, high=16, help="levels with self-attention, counted from 0"
    )
    head_dim: int = number(32, low=1, high=1024, help="channels of an attention head")
    dropout: float = number(0.0, low=0, high=0.9, help="0.2 for small sets")

    def contradictions(self) -> Contradictions:
        if not self.channels:
            yield "channels", "give one number of channels per level, such as [128, 256]"
        wrong = [count for count in self.channels if count % 8]
        if wrong:
            yield "channels", f"group normalisation wants multiples of 8, not {wrong[0]}"
        count = len(self.channels)
        for level in self.attention_levels:
            if level >= count:
                yield (
                    "attention_levels",
                    f"there is no level {level}: channels has {count} (0 to {count - 1})",
                )
        with_attention = [self.channels[-1], *(self.channels[level] for level in self.attention_levels)]
        if any(channels % self.head_dim for channels in with_attention):
            yield (
                "head_dim",
                f"{self.head_dim} does not divide the channels of every level with attention "
                "(the last always has it)",
            )


@dataclass
class TimeConfig:
    """How training draws t in (0, 1): uniform, or sigmoid of a normal.

    The latter is from Esser et al. 2024, arXiv:2403.03206.
    """

    kind: str = choice(
        "auto", "auto", "logit_normal", "uniform",
        help="logit_normal: mostly in the middle; auto: that for flow, else uniform",
    )  # fmt: skip
    mean: float = number(0.0, low=-10, high=10, help="of logit_normal; above 0: nearer to noise")
    std: float = number(1.0, above=0, high=10, help="of logit_normal")


@dataclass
class Stage2Config(TrainConfig):
    """Stage 2 of a recipe."""

    unet: UNetConfig = section(UNetConfig, help="the denoiser")
    objective: str = choice(
        "flow", *SAMPLERS, help="what the network predicts: the velocity of a straight path, the noise, or v"
    )
    time: TimeConfig = section(TimeConfig, help="noise levels that training draws")
    label_dropout: float = number(
        0.1,
        low=0,
        high=1,
        help="how often the class is hidden, for guidance away from no class (Ho & Salimans 2022)",
    )
    guide_at: float | None = number(
        None, above=0, high=1,
        help="0.16: after this share of the training a copy of the averaged weights is kept as the guide, "
        "and sampling leads away from what it predicts (autoguidance, Karras et al. 2024, arXiv:2406.02507); "
        "needs no classes",
    )  # fmt: skip
    validate_samples: int = number(
        0, low=0, high=50_000,
        help="samples drawn at each validation: their KID against decoded held-out latents is logged",
    )  # fmt: skip
    latents: str | None = text(None, help="a folder of saved latents from elsewhere; null: the run's own")

    @property
    def times(self) -> TimeConfig:
        """How times are drawn: of a straight path the middle is what is hard."""
        kind = "logit_normal" if self.objective == "flow" else "uniform"
        return replace(self.time, kind=kind) if self.time.kind == "auto" else self.time

    def contradictions(self) -> Contradictions:
        yield from super().contradictions()
        if 0 < self.validate_samples < LEAST_VALIDATED:
            yield "validate_samples", f"{self.validate_samples} say nothing: 0, or at least {LEAST_VALIDATED}"

    def check_held_out(self, count: int) -> None:
        """Raises InputError where too few images are held out for what a validation is asked for."""
        if self.validate_samples and count < LEAST_VALIDATED:
            cure = f"KID needs {LEAST_VALIDATED} (data.val_fraction), or say 0"
            raise InputError(f"stage2.validate_samples: only {count} images are held out; {cure}")

    def check_latents(self, latent_shape: Sequence[int]) -> None:
        """Raises InputError where the denoiser does not take latents of a shape (c,h,w)."""
        for key, message in self.misfits(latent_shape):
            raise InputError(f"{key}: {message}")

    def misfits(self, latent_shape: Sequence[int]) -> Contradictions:
        """What keeps the denoiser from taking latents of a shape (c,h,w)."""
        _, height, width = latent_shape
        halvings = len(self.unet.channels) - 1
        if height % 2**halvings or width % 2**halvings:
            yield "stage2.unet.channels", f"latents of {height}x{width} cannot be halved {halvings} times"
