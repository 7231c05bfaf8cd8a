"""The schema of `stage1:`. No torch."""

from dataclasses import dataclass
from typing import Any

from shared.config import Contradictions, choice, number, section, text
from shared.training.config import TrainConfig

MS_SSIM_WINDOW = 11  # pixels, the least side of an image


@dataclass
class ModelConfig:
    """The VAE: one stride-2 stage per entry of `channels`; latents of shape (c, h, w), dz = c*h*w."""

    pretrained: str | None = text(
        None,
        help="a folder or hub id of an AutoencoderKL, AutoencoderTiny or AutoencoderDC, instead of the keys "
        "below",
    )
    train: str = choice(
        "all", "all", "decoder", "nothing",
        help="of a pretrained one; nothing: stage 1 only encodes, and reads no max_steps",
    )  # fmt: skip
    channels: list[int] = number(
        [32, 128], low=1, high=8192, help="one stage each, which halves the sides: two make 64 px into 16"
    )
    blocks_per_level: int = number(1, low=0, high=32, help="blocks behind each of these stages")
    block: str = choice("resnet", "resnet", "plain", help="plain: a convolution without a way around it")
    activation: str = choice("silu", "silu", "relu", "leaky_relu", "gelu", help="between the layers")
    norm: str = choice("group", "group", "none", help="group normalisation, or nothing")
    downsample: str = choice(
        "shortcut", "stride", "pool", "shortcut",
        help="shortcut carries the pixels around the strided convolution as channels, and learns fastest",
    )  # fmt: skip
    upsample: str = choice("shortcut", "transposed", "nearest", "shortcut", help="the way back")
    latent_shape: list[int] = number(
        [16, 8, 8],
        low=1,
        high=65536,
        help="(c, h, w); dz = c*h*w numbers for an image; with head: linear any h and w, best those of its "
        "features; with head: conv those of the features, or half of them: 2x2 places become channels, and "
        "stage 2 is four times as fast",
    )
    head: str = choice(
        "conv", "linear", "conv", "identity",
        help="how features become latents: linear by two fully connected layers, identity not at all",
    )  # fmt: skip
    hidden_dim: int | None = number(
        None, low=1, high=65536, help="a layer of this width before the linear heads"
    )
    posterior: str = choice("gaussian", "gaussian", "deterministic", help="a VAE, or an autoencoder")
    output_activation: str = choice(
        "sigmoid", "sigmoid", "none", "relu", "leaky_relu", "hurdle",
        help="acts in [0, 1]; hurdle: a gate for each cell, shut: exactly 0, and a value, for sparse data",
    )  # fmt: skip

    def contradictions(self) -> Contradictions:
        if self.train != "all" and self.pretrained is None:
            yield "train", f"{self.train} is for a pretrained network: name one in pretrained"
        if not self.channels:
            yield "channels", "give one number of channels per stride-2 stage, such as [64, 128, 256, 64]"
        if len(self.latent_shape) != 3:
            yield "latent_shape", f"must be [c, h, w], not {self.latent_shape}; a 2-D latent is [2, 1, 1]"
        if self.head == "identity" and self.posterior == "gaussian":
            yield "head", "identity has no log-variance: use it with posterior: deterministic, or head: conv"
        if self.hidden_dim and self.head != "linear":
            yield "hidden_dim", f"is the width before two fully connected heads; head is {self.head}"

    @property
    def network(self) -> dict[str, Any]:
        """What a new network is made of, beside the shape of its images."""
        return {key: value for key, value in vars(self).items() if key not in ("pretrained", "train")}


@dataclass
class LossWeights:
    """One weight per term; 0: not computed. Every term is a mean: per pixel, or per latent dimension (kl).

    A new term is a weight here (a pixel term also in `contradictions`) and a line in `losses.terms`; a test
    that each term alone reaches the decoder finds it by itself.
    """

    l1: float = number(0.0, low=0, help="absolute error")
    mse: float = number(0.0, low=0, help="squared error")
    bce: float = number(0.0, low=0, help="binary cross-entropy, of pixels taken as probabilities")
    weighted_mse: float = number(
        0.0, low=0, help="for sparse data: a pixel's weight rises with its value, to 1 + activity_weight"
    )
    hurdle: float = number(
        0.0,
        low=0,
        help="of output_activation hurdle: whether a cell is empty; squared error where it is not",
    )
    ms_ssim: float = number(0.0, low=0, help="1 - MS-SSIM, with fewer scales below 176 px")
    lpips: float = number(
        0.0,
        low=0,
        help="perceptual distance, sharpens; needs backbone weights (downloaded, or stage1.lpips.weights)",
    )
    kl: float = number(0.0, low=0, help="beta: how strongly latents are drawn towards N(0, 1)")
    adversarial: float = number(
        0.0, low=0, help="0.05 adds texture to photographs, and a fifth to the time of a step"
    )

    def contradictions(self) -> Contradictions:
        of_pixels = (self.l1, self.mse, self.bce, self.weighted_mse, self.hurdle, self.ms_ssim, self.lpips)
        if not any(of_pixels):
            terms = "l1, mse, bce, weighted_mse, hurdle, ms_ssim, lpips"
            yield "l1", f"no term compares the reconstruction with the image: set one of {terms}"


@dataclass
class KLConfig:
    """How the KL term is controlled: how its weight moves, and a floor or a target for the term itself."""

    kind: str = choice(
        "constant", "constant", "linear", "cosine", "cyclical",
        help="linear and cosine rise from 0 over warmup_steps, cyclical again and again",
    )  # fmt: skip
    warmup_steps: int = number(0, low=0, help="of linear and cosine")
    cycles: int = number(4, low=1, help="of cyclical, over the whole training")
    ratio: float = number(0.5, above=0, high=1, help="the share of a cycle in which beta rises")
    free_bits: float = number(0.0, low=0, help="nats per latent below which the KL costs no less")
    target: float | None = number(
        None, low=0, help="nats per latent to be kept, instead of as few as possible"
    )

    def contradictions(self) -> Contradictions:
        if self.kind in ("linear", "cosine") and not self.warmup_steps:
            yield "warmup_steps", f"{self.kind} rises over warmup_steps: give more than 0, or kind: constant"
        if self.free_bits and self.target is not None:
            yield "free_bits", "free_bits and target are two answers to one question: keep one"


@dataclass
class LpipsConfig:
    """The perceptual network and what it is shown."""

    net: str = choice("vgg", "vgg", "alex", "squeeze", help="alex costs a tenth of vgg")
    weights: str | None = text(
        None,
        help="a safetensors file or a folder of them; null: LATENT_STACK_WEIGHTS where it is "
        "set, else a download",
    )
    channels: str = choice(
        "repeat",
        "repeat",
        "each",
        help="repeat 1 channel, show 3 as they are and RGBA on white; each by itself",
    )
    crop: int | None = number(
        None,
        low=1,
        high=8192,
        help="training shows it a square of this side, another one at each step; null: all",
    )


@dataclass
class DiscriminatorConfig:
    """The discriminator of the adversarial term, and when that term begins and how it rises."""

    channels: list[int] = number([32, 64, 128], low=1, high=8192, help="one strided convolution each")
    lr: float = number(4e-3, above=0, high=1, help="its rate; the rest is as in optim")
    start_step: int = number(0, low=0, help="reconstructions first: nothing adversarial before this step")
    ramp_steps: int = number(0, low=0, help="steps over which the term's weight rises after that")

    def contradictions(self) -> Contradictions:
        if not self.channels:
            yield "channels", "give one number of channels per strided convolution, such as [64, 128, 256]"


@dataclass
class Stage1Config(TrainConfig):
    """Stage 1 of a recipe."""

    model: ModelConfig = section(ModelConfig, help="the VAE")
    loss_weights: LossWeights = section(
        LossWeights, help="one for each term, all of them means over pixels or latents; 0: not computed"
    )
    kl_schedule: KLConfig = section(KLConfig, help="how the KL term's weight moves, its floor or its target")
    lpips: LpipsConfig = section(LpipsConfig, help="the perceptual network of the lpips term")
    discriminator: DiscriminatorConfig = section(
        DiscriminatorConfig, help="of the adversarial term: a PatchGAN"
    )
    activity_weight: float = number(
        20.0,
        low=0,
        help="weighted_mse: a pixel at the top of the range weighs 1 + this, an empty one 1; hurdle: weight "
        "of a value's error, relative to 1 for that of its gate",
    )

    @property
    def trains(self) -> bool:
        return self.model.train != "nothing"

    def contradictions(self) -> Contradictions:
        yield from super().contradictions()
        if self.init and self.model.pretrained:
            yield "init", "model.pretrained is a beginning already: keep one of the two"
        if self.model.posterior == "deterministic" and self.loss_weights.kl and not self.model.pretrained:
            yield "loss_weights.kl", "a deterministic autoencoder has no KL: set it to 0"
        of_the_batch = self.kl_schedule.free_bits or self.kl_schedule.target is not None
        if of_the_batch and self.loss_weights.kl and self.grad_accumulation > 1:
            reason = "free_bits and target look at the KL of the whole batch, which no part of it knows"
            yield "grad_accumulation", f"{reason}: set it to 1 (and batch_size lower where memory is short)"
        hurdle = self.model.output_activation == "hurdle"
        if bool(self.loss_weights.hurdle) != hurdle:
            reason = "output_activation: hurdle and the term hurdle go together"
            yield "loss_weights.hurdle", f"{reason}: set both or neither"
        if hurdle and self.model.pretrained:
            yield "model.output_activation", "hurdle is of a new network, not of a pretrained one"
        if self.loss_weights.bce and (self.model.pretrained or self.model.output_activation != "sigmoid"):
            yield (
                "loss_weights.bce",
                "bce reads the decoder's logits: it needs model.output_activation: sigmoid and no pretrained",
            )
