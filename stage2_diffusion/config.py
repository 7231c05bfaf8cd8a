"""The schema of `stage2:`. Standard library and OmegaConf only."""

from dataclasses import dataclass, field

from shared.config import choice, number
from shared.training.config import TrainConfig

# Which samplers integrate which objective: flow is an ODE in t, epsilon and v live on a DDPM schedule.
SAMPLERS = {"flow": ("euler", "heun", "dpmpp"), "epsilon": ("ddim", "dpmpp"), "v": ("ddim", "dpmpp")}


@dataclass
class UNetConfig:
    """The denoiser, a diffusers UNet2DModel: one level per entry of `channels`, attention at `attention_levels`."""

    channels: list[int] = number([128, 256], low=8, high=8192)
    blocks_per_level: int = number(2, low=1, high=16)
    attention_levels: list[int] = number([1], low=0, high=16)
    head_dim: int = number(32, low=1, high=1024)
    dropout: float = number(0.0, low=0, high=0.9)

    def contradictions(self):
        if not self.channels:
            yield "channels", "give one number of channels per level, such as [128, 256]"
        if wrong := [c for c in self.channels if c % 8]:
            yield "channels", f"group normalisation wants multiples of 8, not {wrong[0]}"
        for level in self.attention_levels:
            if level >= len(self.channels):
                yield "attention_levels", f"there is no level {level}: channels has {len(self.channels)} (0 to {len(self.channels) - 1})"
        if self.channels[-1] % self.head_dim or any(self.channels[i] % self.head_dim for i in self.attention_levels):
            yield "head_dim", f"{self.head_dim} does not divide the channels of every level with attention (the last always has it)"


@dataclass
class TimeConfig:
    """How t in (0, 1) is drawn in training: sigmoid of a normal (Esser et al. 2024, arXiv:2403.03206), or uniform."""

    kind: str = choice("logit_normal", "logit_normal", "uniform")
    mean: float = number(0.0, low=-10, high=10)
    std: float = number(1.0, above=0, high=10)


@dataclass
class Stage2Config(TrainConfig):
    """Stage 2 of a recipe. `latents`: a folder of saved latents from elsewhere; empty: the run's own.

    `guide_at`: the averaged weights at this share of the training are kept, and guidance leads away from them (autoguidance,
    Karras et al. 2024, arXiv:2406.02507); empty: away from "no class" (Ho & Salimans 2022).
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    objective: str = choice("flow", "flow", "epsilon", "v")
    time: TimeConfig = field(default_factory=TimeConfig)
    label_dropout: float = number(0.1, low=0, high=1)
    guide_at: float | None = number(None, above=0, high=1)
    latents: str | None = None
