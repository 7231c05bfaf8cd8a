"""How alike two images are: PSNR, SSIM and the LPIPS network. Pixels are in [-1, 1] everywhere.

Does not depend on what made the images. Dimension key: B batch, C channels, H W pixels.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from shared.config import InputError
from shared.disk import read_tensors, weights_file

# file names looked for in a folder of weights, and the prefix of the backbone's layers in them
BACKBONES = {"vgg": "vgg16_features", "alex": "alexnet_features", "squeeze": "squeezenet1_1"}


def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio 10 log10(range^2 / MSE), range 2, of each image.

    Arguments:
        x_hat: reconstructions (B,C,H,W), clipped to [-1, 1].
        x: images (B,C,H,W).

    Returns:
        Decibels, (B,).
    """
    mse = (x_hat.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def ssim(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Structural similarity with a Gaussian window of 11 pixels, smaller for tiny images.

    Arguments:
        x_hat: reconstructions (B,C,H,W), clipped to [-1, 1].
        x: images (B,C,H,W).

    Returns:
        In [-1, 1], 1 for equal images, (B,).

    References:
        Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, equation
            13.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    y_hat = (x_hat.float().clamp(-1, 1) + 1) / 2
    y = (x.float().clamp(-1, 1) + 1) / 2
    sigma = 1.5 * min(
        1.0, min(x.shape[-2:]) / 11
    )  # the library's window is as wide as sigma says: 11 pixels at 1.5
    with torch.autocast(
        x.device.type, enabled=False
    ):  # its variances are differences: bfloat16 has no digits left
        found: Any = structural_similarity_index_measure(
            y_hat, y, sigma=sigma, data_range=1.0, reduction="none"
        )
    return found.reshape(len(x))


def load_lpips(net: str, weights: str | None, device: torch.device | str) -> torch.nn.Module:
    """The LPIPS network of the lpips package, frozen, in eval mode; never with random weights.

    Its backbone comes from a local safetensors file (torchvision's names, `features.*`) or from torchvision's
    download. Raises InputError where neither can be had.
    """
    file = weights_file(BACKBONES[net], weights)
    try:
        import lpips
    except ImportError:
        cure = "pip install 'latent-stack[perceptual]'"
        raise InputError(f"stage1.loss_weights.lpips needs the package lpips: {cure}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision by its old argument names
            network = lpips.LPIPS(net=net, pnet_rand=file is not None, verbose=False)
    except OSError as error:  # URLError among them
        raise InputError(
            f"LPIPS: the weights of {net} could not be downloaded ({error}); "
            f"put {BACKBONES[net]}.safetensors into a folder and name it in stage1.lpips.weights or "
            "LATENT_STACK_WEIGHTS, or set stage1.loss_weights.lpips: 0"
        ) from None
    if file:
        _fill_backbone(network.net, file)
    network = network.to(device, memory_format=torch.channels_last)  # a fifth faster in bf16 on a CPU
    return network.eval().requires_grad_(False)


def _fill_backbone(backbone: torch.nn.Module, path: Path) -> None:
    """Load torchvision's `features.N.*` into the slices of the lpips package, which keep the numbers N."""
    given = {name.removeprefix("features."): weight.float() for name, weight in read_tensors(path).items()}
    filled = {}
    for key, weight in backbone.state_dict().items():
        found = given.get(key.split(".", 1)[1])
        if found is None or found.shape != weight.shape:
            reason = f"layer {key} is missing or has another shape"
            raise InputError(f"{path}: not the weights of this LPIPS network ({reason})")
        filled[key] = found
    backbone.load_state_dict(filled)
