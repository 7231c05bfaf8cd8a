"""The schema of `stage1:`. Standard library and OmegaConf only."""

import math
from dataclasses import dataclass, field

from shared.config import choice, number
from shared.training.config import TrainConfig


@dataclass
class ModelConfig:
    """The VAE: one stride-2 stage per entry of `channels`; latents of shape (c, h, w), dz = c*h*w."""

    channels: list[int] = number([64, 128, 256, 64], low=1, high=8192)
    blocks_per_level: int = number(1, low=0, high=32)
    block: str = choice("resnet", "resnet", "plain")
    activation: str = choice("silu", "silu", "relu", "leaky_relu", "gelu")
    norm: str = choice("group", "group", "none")
    downsample: str = choice("stride", "stride", "pool", "shortcut")
    upsample: str = choice("transposed", "transposed", "nearest", "shortcut")
    latent_shape: list[int] = number([8, 8, 8], low=1, high=65536)
    head: str = choice("linear", "linear", "conv", "identity")
    hidden_dim: int | None = number(None, low=1, high=65536)
    posterior: str = choice("gaussian", "gaussian", "deterministic")
    output_activation: str = choice("sigmoid", "sigmoid", "none", "relu", "leaky_relu")

    def contradictions(self):
        if not self.channels:
            yield "channels", "give one number of channels per stride-2 stage, such as [64, 128, 256, 64]"
        if len(self.latent_shape) != 3:
            yield "latent_shape", f"must be [c, h, w], not {self.latent_shape}; a 2-D latent is [2, 1, 1]"
        if self.head == "identity" and self.posterior == "gaussian":
            yield "head", "identity has no log-variance: use it with posterior: deterministic, or head: conv"
        if self.hidden_dim and self.head != "linear":
            yield "hidden_dim", f"is the width before two fully connected heads; head is {self.head}"

    @property
    def dz(self) -> int:
        return math.prod(self.latent_shape)


@dataclass
class LossWeights:
    """One weight per term; 0 means not computed. Every term is a mean: per pixel, or per latent dimension (kl)."""

    l1: float = number(0.0, low=0)
    mse: float = number(0.0, low=0)
    bce: float = number(0.0, low=0)
    weighted_mse: float = number(0.0, low=0)
    ms_ssim: float = number(0.0, low=0)
    lpips: float = number(0.0, low=0)
    kl: float = number(0.0, low=0)
    adversarial: float = number(0.0, low=0)

    def contradictions(self):
        if not any((self.l1, self.mse, self.bce, self.weighted_mse, self.ms_ssim, self.lpips)):
            yield "l1", "no term compares the reconstruction with the image: set one of l1, mse, bce, weighted_mse, ms_ssim, lpips"


@dataclass
class KLConfig:
    """How the KL term is controlled: the way its weight moves, and a floor or a target for the term itself."""

    kind: str = choice("constant", "constant", "linear", "cosine", "cyclical")
    warmup_steps: int = number(0, low=0)
    cycles: int = number(4, low=1)
    ratio: float = number(0.5, above=0, high=1)
    free_bits: float = number(0.0, low=0)
    target: float | None = number(None, low=0)

    def contradictions(self):
        if self.kind in ("linear", "cosine") and not self.warmup_steps:
            yield "warmup_steps", f"{self.kind} rises over so many steps: give more than 0, or kind: constant"
        if self.free_bits and self.target is not None:
            yield "free_bits", "free_bits and target are two answers to one question: keep one"


@dataclass
class LpipsConfig:
    """The perceptual network. `weights`: a safetensors file or a folder of them; empty: LATENT_STACK_WEIGHTS, then download.

    `crop`: the side of the square that training shows it, another one at each step; empty: the whole image.
    """

    net: str = choice("vgg", "vgg", "alex", "squeeze")
    weights: str | None = None
    channels: str = choice("repeat", "repeat", "each")
    crop: int | None = number(None, low=1, high=8192)


@dataclass
class DiscriminatorConfig:
    """The discriminator of the adversarial term, and when that term begins and how it rises."""

    channels: list[int] = number([64, 128, 256], low=1, high=8192)
    lr: float = number(1e-4, above=0, high=1)
    start_step: int = number(0, low=0)
    ramp_steps: int = number(0, low=0)

    def contradictions(self):
        if not self.channels:
            yield "channels", "give one number of channels per strided convolution, such as [64, 128, 256]"


@dataclass
class Stage1Config(TrainConfig):
    """Stage 1 of a recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    kl_schedule: KLConfig = field(default_factory=KLConfig)
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    activity_weight: float = number(20.0, low=0)  # weighted_mse: a pixel at the top of the range weighs 1 + this, an empty one 1

    def contradictions(self):
        yield from super().contradictions()
        if self.model.posterior == "deterministic" and self.loss_weights.kl:
            yield "loss_weights.kl", "a deterministic autoencoder has no KL: set it to 0"
        if self.loss_weights.bce and self.model.output_activation != "sigmoid":
            yield "loss_weights.bce", "bce reads the decoder's logits: it needs model.output_activation: sigmoid"
