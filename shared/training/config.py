"""The schema of what both stages share: optimizer, averaged weights, length and rhythm of a training."""

from dataclasses import dataclass, field

from shared.config import choice, number


@dataclass
class OptimConfig:
    """One optimizer step: AdamW, Adam or Muon, clipping by the global norm, a schedule that is a function of the step."""

    name: str = choice("adamw", "adamw", "adam", "muon")
    lr: float = number(1e-4, above=0, high=1)
    betas: list[float] = number([0.9, 0.999], low=0, high=0.99999)
    weight_decay: float = number(0.01, low=0, high=1)
    clip_grad_norm: float = number(1.0, above=0)
    schedule: str = choice("constant", "constant", "cosine", "linear")
    warmup_steps: int = number(0, low=0)

    def contradictions(self):
        if len(self.betas) != 2:
            yield "betas", f"two numbers, not {len(self.betas)}"


@dataclass
class EmaConfig:
    """Averaged weights: theta_ema <- d theta_ema + (1 - d) theta, with d rising to `decay` over the first steps."""

    decay: float = number(0.999, low=0, high=0.999999)


@dataclass
class TrainConfig:
    """How long and in what rhythm a stage trains. `batch_size` is global: images per update over all processes."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    batch_size: int = number(64, low=1)
    grad_accumulation: int = number(1, low=1)
    max_steps: int | None = number(None, low=1)
    max_epochs: int | None = number(None, low=1)
    save_every: int = number(500, low=1)
    validate_every: int = number(500, low=1)
    preview_every: int = number(500, low=1)
    keep: int = number(2, low=2)
    mixed_precision: str = choice("auto", "auto", "fp32", "bf16")
    compile: bool = False

    def contradictions(self):
        if (self.max_steps is None) == (self.max_epochs is None):
            yield "max_steps", "give exactly one of max_steps and max_epochs (set the other to null)"
        if self.batch_size % self.grad_accumulation:
            yield "batch_size", f"{self.batch_size} is not divisible by grad_accumulation ({self.grad_accumulation})"

    def steps(self, num_images: int) -> int:
        """The number of optimizer updates, epochs counted in images seen."""
        return self.max_steps or -(-self.max_epochs * num_images // self.batch_size)


# What a run may change and still go on: nothing that stands on disk depends on it.
FREE_KEYS = ("grad_accumulation", "max_steps", "max_epochs", "save_every", "validate_every", "preview_every", "keep", "compile")


@dataclass
class TrackingConfig:
    """Trackers beside metrics.jsonl, which is always written."""

    with_: list[str] = choice([], "wandb", "tensorboard")
    project: str = "latent-stack"
