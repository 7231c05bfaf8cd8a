"""The schema that both stages share: optimizer, averaged weights, length and rhythm; and the trackers."""

from dataclasses import dataclass

from shared.config import Contradictions, choice, number, section, switch, text


@dataclass
class OptimConfig:
    """One optimizer step: AdamW, Adam or Muon, clipping by global norm, a rate as a function of the step."""

    name: str = choice(
        "muon", "adamw", "adam", "muon", help="muon learns faster per step; adamw wants a quarter of its rate"
    )
    lr: float = number(4e-3, above=0, high=1, help="the highest rate, after the warm-up")
    betas: list[float] = number([0.9, 0.999], low=0, high=0.99999, help="decay of Adam's two moments")
    weight_decay: float = number(0.01, low=0, high=1, help="of adamw and muon")
    clip_grad_norm: float = number(1.0, above=0, help="longer gradients are shortened to this norm")
    schedule: str = choice(
        "cosine", "constant", "cosine", "linear", help="cosine and linear fall to 0 at max_steps"
    )
    warmup_steps: int = number(100, low=0, help="the rate rises linearly over this number of steps")

    def contradictions(self) -> Contradictions:
        if len(self.betas) != 2:
            yield "betas", f"two numbers, not {len(self.betas)}"


@dataclass
class EmaConfig:
    """Averaged weights: theta_ema <- d theta_ema + (1 - d) theta; d rises to `decay` over the first steps."""

    decay: float = number(0.999, low=0, high=0.999999, help="0.99 for a training of a few hundred steps")


MEASURED = 64  # images or latents at once, at most


@dataclass
class TrainConfig:
    """How long and in what rhythm a stage trains.

    `batch_size` is global: images per update over all processes.
    """

    init: str | None = text(
        None, help="begin from the weights of a run, an export or a checkpoint; what does not fit is named"
    )
    optim: OptimConfig = section(OptimConfig, help="one optimizer step")
    ema: EmaConfig = section(
        EmaConfig, help="averaged weights: what is validated, shown, encoded and sampled with"
    )
    batch_size: int = number(64, low=1, help="images per update, over all processes")
    grad_accumulation: int = number(1, low=1, help="an update in this number of parts, where memory is short")
    max_steps: int | None = number(None, low=1, help="updates; this or max_epochs")
    max_epochs: int | None = number(None, low=1, help="passes over the training images")
    save_every: int = number(1000, low=1, help="steps between two checkpoints")
    validate_every: int = number(1000, low=1, help="steps between two measurements of held-out images")
    preview_every: int = number(1000, low=1, help="steps between two pictures")
    keep: int = number(2, low=2, help="checkpoints that are kept, beside the best one")
    mixed_precision: str = choice(
        "auto", "auto", "fp32", "bf16", help="auto: bf16 where the device computes in it"
    )
    compile: bool = switch(False, help="torch.compile: minutes at the start, then faster steps")
    deterministic: bool = switch(False, help="equal bits at a resume on a GPU, too, but for ms_ssim; slower")
    gradient_checkpointing: bool = switch(
        False, help="less memory, a third more computing: layers are computed again in the backward pass"
    )
    profile: list[int] | None = number(
        None, low=0, help="[first, end]: what is computed in these steps goes into trace.json, for Perfetto"
    )

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return True

    def contradictions(self) -> Contradictions:
        if self.trains and (self.max_steps is None) == (self.max_epochs is None):
            yield "max_steps", "give exactly one of max_steps and max_epochs (set the other to null)"
        if self.batch_size % self.grad_accumulation:
            yield (
                "batch_size",
                f"{self.batch_size} is not divisible by grad_accumulation ({self.grad_accumulation})",
            )
        if self.profile is not None and (len(self.profile) != 2 or self.profile[0] >= self.profile[1]):
            yield "profile", f"a first step and a later one to end at, not {self.profile}"

    def at_once(self, processes: int) -> int:
        """Images or latents that a process measures at once: no more than a micro-batch has on each."""
        return max(1, min(MEASURED, self.batch_size // (self.grad_accumulation * processes)))

    def steps(self, num_images: int) -> int:
        """The number of optimizer updates, epochs counted in images seen."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_epochs is not None  # contradictions() saw to it
        return -(-self.max_epochs * num_images // self.batch_size)


@dataclass
class TrackingConfig:
    """Trackers beside metrics.jsonl, which is always written."""

    with_: list[str] = choice([], "wandb", "tensorboard", help="[] for metrics.jsonl alone")
    project: str = text("latent-stack", help="the tracker's project")


# What a run may change and still go on: nothing that stands on disk depends on it. init is read at the start,
# latents are told by their statistics.
FREE_KEYS = (
    "init", "latents", "grad_accumulation", "max_steps", "max_epochs", "save_every", "validate_every",
    "preview_every", "validate_samples", "keep", "compile", "deterministic", "profile",
    "gradient_checkpointing",
)  # fmt: skip
