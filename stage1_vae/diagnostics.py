"""What a VAE is doing: how much its latents say, how near the prior they are, whether and why it collapsed.

Takes moments and pixels. Does not depend on how they were trained.
Dimension key: B batch, N images, C H W pixels, c h w latents, dz = c*h*w.
"""

import math
import operator

import torch

from stage1_vae.losses import kl_per_dimension, pixel_weights

ACTIVE = (
    0.01  # variance below which a latent counts as inactive (Burda et al. 2016, arXiv:1509.00519, section 5)
)
ENOUGH = 16  # images below which nothing is said about a collapse


def active_units(means: torch.Tensor) -> int:
    """The number of latent dimensions whose posterior mean varies over the data: Var_x(E[z|x]) > 0.01.

    means: posterior means (N,c,h,w) of N images.
    """
    return int((means.flatten(1).float().var(dim=0, correction=0) > ACTIVE).sum())


def kl_bits(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Bits that each latent dimension tells about an image on average, (c,h,w), from moments (N,c,h,w)."""
    return kl_per_dimension(mean, logvar).mean(0) / math.log(2)


def aggregate(mean: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, each (c,h,w), of the aggregate posterior E_x q(z|x): 0 and 1 if it is the prior."""
    return mean.mean(0), (mean.var(0, correction=0) + logvar.exp().mean(0)).sqrt()


class PixelVariance:
    """How images and reconstructions vary over the data, pixel by pixel, a batch at a time."""

    def __init__(self, activity_weight: float | None = None):
        self.activity_weight = activity_weight
        self.count = 0
        self.error = torch.zeros((), dtype=torch.float64)
        self.moments: dict[str, tuple] = {
            "x": (0.0, 0.0),
            "x_hat": (0.0, 0.0),
        }  # sums of values and of squares
        self.weighted: tuple = (0.0, 0.0, 0.0)  # sums of w, w x and w x^2

    def add(self, x: torch.Tensor, x_hat: torch.Tensor) -> None:
        """Pixels (B,C,H,W) in [-1, 1] and their reconstructions."""
        x, x_hat = x.cpu(), x_hat.cpu()  # doubles, which not every device has
        self.count += len(x)
        self.error = self.error + (x_hat - x).square().sum(0).mean().double()
        for name, images in (("x", x), ("x_hat", x_hat)):
            first, second = self.moments[name]
            doubles = images.double()
            self.moments[name] = (first + doubles.sum(0), second + doubles.square().sum(0))
        if self.activity_weight is not None:
            w = pixel_weights(x, self.activity_weight).double()
            wx = w * x.double()
            sums = (w.sum(0), wx.sum(0), (wx * x.double()).sum(0))
            self.weighted = tuple(total + new for total, new in zip(self.weighted, sums, strict=True))

    def join(self, other: "PixelVariance") -> None:
        """Take in what another one has seen."""
        self.count += other.count
        self.error = self.error + other.error
        for name, sums in other.moments.items():
            self.moments[name] = tuple(map(operator.add, self.moments[name], sums))
        self.weighted = tuple(map(operator.add, self.weighted, other.weighted))

    def numbers(self) -> dict[str, torch.Tensor]:
        """The numbers found over all images added.

        mse: of the reconstructions
        mean_image_mse: of the best image that is the same for all, which is the variance of the images
        reconstruction_variance: how much the reconstructions themselves vary
        mean_image_weighted_mse: with an activity_weight, the weighted error of the image that is best by it
        """
        found = {
            "mse": self.error / self.count,
            "mean_image_mse": self._variance("x"),
            "reconstruction_variance": self._variance("x_hat"),
        }
        if self.activity_weight is not None:
            w, wx, wxx = self.weighted
            found["mean_image_weighted_mse"] = (wxx - wx.square() / w).mean() / self.count
        return found

    def _variance(self, name: str) -> torch.Tensor:
        first, second = self.moments[name]
        return (second / self.count - (first / self.count).square()).mean()


def collapse(
    mse: float, mean_image_mse: float, reconstruction_variance: float, active: int, dz: int, beta: float
) -> str | None:
    """Whether a VAE has collapsed: the cause and the cure in one line, None where it is well.

    To be asked of a few dozen images at least. A dead decoder is worse than the mean image and the same for
    all; a posterior that is the prior says that beta is too strong; latents that vary under reconstructions
    that do not, a decoder that stays at the mean image.
    """
    flat = reconstruction_variance < 0.02 * mean_image_mse
    if flat and mse > 1.1 * mean_image_mse:
        return (
            "collapse, dead decoder: every reconstruction is the same and worse than the mean image, "
            "after too few steps or behind an output activation gone flat; train longer, or "
            "stage1.model.output_activation: none, the bce term, a lower rate"
        )
    if active == 0 and beta:
        return (
            "collapse, beta too strong: no latent says anything; "
            f"a lower stage1.loss_weights.kl than {beta:g}, kl_schedule or free_bits"
        )
    if flat or mse > 0.9 * mean_image_mse:
        return (
            "collapse, mean image: reconstructions hardly differ from the mean of all images; "
            "train longer, or give weight to what is rare (weighted_mse, bce)"
        )
    if active < 0.1 * dz and beta:
        return (
            f"only {active} of {dz} latents are in use: "
            f"beta {beta:g} is strong for the reconstruction terms, or dz larger than needed"
        )
    return None
