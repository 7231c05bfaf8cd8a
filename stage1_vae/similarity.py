"""Measures of images against images. Pixels are in [-1, 1] everywhere."""

import warnings
from pathlib import Path

import torch

from shared.config import InputError
from shared.disk import read_tensors, weights_file

# file names looked for in a folder of weights, and the prefix of the backbone's layers in them
BACKBONES = {"vgg": "vgg16_features", "alex": "alexnet_features", "squeeze": "squeezenet1_1"}


def psnr(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,): 10 log10(range^2 / MSE) with range 2."""
    mse = (x_hat.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def ssim(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image, (B,): Gaussian window of 11 pixels (Wang et al. 2004), smaller for tiny images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    x_hat, x = ((images.float().clamp(-1, 1) + 1) / 2 for images in (x_hat, x))
    sigma = 1.5 * min(1.0, x.shape[-1] / 11)  # the library makes its window as wide as sigma says: 11 pixels at 1.5
    with torch.autocast(x.device.type, enabled=False):  # its variances are differences: bfloat16 has no digits for them
        return structural_similarity_index_measure(x_hat, x, sigma=sigma, data_range=1.0, reduction="none").reshape(len(x))


def load_lpips(net: str, weights: str | None, device) -> torch.nn.Module:
    """The LPIPS network of the lpips package, frozen, in eval mode; never with random weights.

    Its backbone comes from a local safetensors file (torchvision's names, `features.*`) or from torchvision's download.
    Raises InputError where neither can be had.
    """
    file = weights_file(BACKBONES[net], weights)
    try:
        import lpips
    except ImportError:
        raise InputError("stage1.loss_weights.lpips needs the package lpips: pip install 'latent-stack[perceptual]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision by its old argument names
            network = lpips.LPIPS(net=net, pnet_rand=file is not None, verbose=False)
    except OSError as error:  # URLError among them
        raise InputError(
            f"LPIPS: the weights of {net} could not be downloaded ({error}); put {BACKBONES[net]}.safetensors into a folder and "
            "name it in stage1.lpips.weights or LATENT_STACK_WEIGHTS, or set stage1.loss_weights.lpips: 0"
        ) from None
    if file:
        _fill_backbone(network.net, file)
    network = network.to(device, memory_format=torch.channels_last)  # a fifth faster in bf16 on a CPU
    return network.eval().requires_grad_(False)


def _fill_backbone(backbone: torch.nn.Module, path: Path) -> None:
    """Load torchvision's `features.N.*` into the slices of the lpips package, which keep the layers' numbers N."""
    given = {k.removeprefix("features."): v.float() for k, v in read_tensors(path).items() if k.startswith("features.")}
    wanted = backbone.state_dict()
    filled = {key: given.get(key.split(".", 1)[1]) for key in wanted}
    wrong = [key for key, value in filled.items() if value is None or value.shape != wanted[key].shape]
    if wrong:
        raise InputError(f"{path}: not the weights of this LPIPS network (layer {wrong[0]} is missing or has another shape)")
    backbone.load_state_dict(filled)
