"""The VAE in all its shapes: latents as asked, pixels in range, saved and loaded to the bit."""

import itertools

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from stage1_vae import model
from stage1_vae.layers import ResnetBlock, ShortcutDown, ShortcutUp, tiled
from stage1_vae.model import DeepVAE


def make(**options):
    torch.manual_seed(0)
    return DeepVAE(
        **(
            {
                "in_channels": 3,
                "image_size": 32,
                "channels": [8, 16],
                "latent_shape": [4, 8, 8],
                "head": "conv",
            }
            | options
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "linear", "latent_shape": [2, 1, 1]},
        {"head": "linear", "latent_shape": [8, 8, 8], "hidden_dim": 16},
        {
            "head": "linear",
            "latent_shape": [8, 8, 8],
            "in_channels": 1,
            "channels": [8, 8, 16, 8],
            "blocks_per_level": 2,
        },
        {"head": "identity", "latent_shape": [16, 8, 8], "posterior": "deterministic", "norm": "none"},
        {"block": "plain", "downsample": "pool", "upsample": "nearest", "activation": "relu"},
        {"posterior": "deterministic", "activation": "gelu", "output_activation": "none"},
        {"latent_shape": [16, 4, 4]},
        {"in_channels": 7, "output_activation": "leaky_relu", "activation": "leaky_relu"},
        {"output_activation": "relu", "blocks_per_level": 0},
        {"in_channels": 1, "channels": [6, 40], "downsample": "shortcut", "upsample": "shortcut"},
    ],
)
def test_shapes_and_ranges(options):
    vae = make(**options)
    x = torch.rand(2, vae.config.in_channels, 32, 32) * 2 - 1
    shape = (2, *vae.config.latent_shape)
    posterior = vae.encode(x).latent_dist
    assert posterior.mean.shape == posterior.logvar.shape == shape
    x_hat = vae.decode(posterior.sample()).sample
    assert x_hat.shape == x.shape
    if vae.config.output_activation == "sigmoid":
        assert x_hat.min() >= -1 and x_hat.max() <= 1
    logits, mean, logvar = vae(x, noise=torch.randn(shape))
    assert logits.shape == x.shape and mean.shape == logvar.shape == shape
    if vae.deterministic:
        assert (posterior.logvar == -30).all()
        assert torch.equal(posterior.sample(), posterior.mean)
        torch.testing.assert_close(vae.activate(logits), vae.decode(mean).sample)


def test_the_default_is_the_deep_vae():
    vae = DeepVAE()
    assert vae.config.latent_shape == (8, 8, 8)
    strided = [m for m in vae.encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 4 and all(
        m.kernel_size == (3, 3) for m in vae.encoder.modules() if isinstance(m, torch.nn.Conv2d)
    )
    assert vae.to_moments[1].out_features == 2 * 512


def test_forward_uses_the_noise_it_is_given():
    vae = make()
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
    logits, mean, logvar = vae(x, noise=noise)
    torch.testing.assert_close(logits, vae.logits(mean + (0.5 * logvar).exp() * noise))
    assert not torch.equal(logits, vae(x, noise=-noise)[0])


def test_linear_heads_begin_local_where_latents_have_the_places_of_features():
    """A place of the features moves the latents of that place alone, and the other way; training may mix."""
    vae = make(head="linear", latent_shape=[6, 8, 8])
    features, z = torch.randn(1, 16, 8, 8), torch.randn(1, 6, 8, 8)
    there = torch.zeros(8, 8, dtype=torch.bool)
    there[2, 5] = True
    for layer, x in ((vae.to_moments, features), (vae.from_latent, z)):
        changed = (layer(x) != layer(torch.where(there, x + 1, x))).any(dim=(0, 1))
        assert torch.equal(changed, there)
        layer(x).square().sum().backward()
        assert all((p.grad != 0).any(dim=0).all() for p in layer.parameters())


def test_saved_and_loaded(tmp_path):
    vae = make(head="linear", latent_shape=[8, 2, 2])
    vae.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = DeepVAE.from_pretrained(tmp_path)
    z = torch.randn(2, 8, 2, 2)
    assert torch.equal(vae.eval().decode(z).sample, again.eval().decode(z).sample)


def test_a_new_stack_of_residual_blocks_is_the_identity():
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(ResnetBlock(16, "group", "silu")(x), x)


def shortcuts_alone(*channels):
    """Down and up again through these numbers of channels, with all convolutions at zero."""
    downs = [ShortcutDown(a, b) for a, b in itertools.pairwise(channels)]
    layers = torch.nn.Sequential(
        *downs, *(ShortcutUp(b, a) for a, b in reversed(list(itertools.pairwise(channels))))
    )
    for p in layers.parameters():
        torch.nn.init.zeros_(p)
    return layers


@pytest.mark.parametrize("channels", [(4, 8, 32), (4, 16, 16), (1, 32, 128)])
def test_shortcuts_alone_keep_what_is_constant(channels):
    x = torch.randn(2, channels[0], 1, 1).expand(-1, -1, 8, 8).contiguous()
    torch.testing.assert_close(shortcuts_alone(*channels)(x), x)


def test_shortcuts_alone_lose_nothing_where_there_are_channels_enough():
    image = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(shortcuts_alone(4, 16, 64)(image), image)
    assert not torch.allclose(shortcuts_alone(4, 8)(image), image)
    assert shortcuts_alone(4, 12, 24)(image).shape == image.shape


@torch.no_grad()
def test_folded_latents_are_the_same_numbers_in_another_order():
    plain, folded = make(), make(latent_shape=[16, 4, 4])
    renamed = {"to_moments.": "to_moments.0.", "from_latent.": "from_latent.1."}
    weights = plain.state_dict()
    for before, after in renamed.items():
        weights |= {
            name.replace(before, after): weights.pop(name) for name in list(weights) if before in name
        }
    folded.load_state_dict(weights)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for ours, theirs in zip(folded.moments(x), plain.moments(x), strict=True):
        assert torch.equal(ours, pixel_unshuffle(theirs, 2))
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(folded.decode(pixel_unshuffle(z, 2)).sample, plain.decode(z).sample)


# ---------------------------------------------------------------- as autoencoders of diffusers


def conv_vae(fold=1):
    torch.manual_seed(0)
    return DeepVAE(
        3, 32, channels=(8, 16), latent_shape=(4 * fold**2, 8 // fold, 8 // fold), head="conv"
    ).eval()


@pytest.mark.parametrize("fold", [1, 2])
def test_what_every_script_computes_from_the_config_is_true(fold):
    vae = conv_vae(fold)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode() * vae.config.scaling_factor
    assert latents.shape == (1, vae.config.latent_channels, 32 // scale, 32 // scale)
    assert vae.config.sample_size == 32 and vae.config.in_channels == vae.config.out_channels == 3
    assert "latent_channels" not in vae.to_json_string()  # derived, and said once


def test_a_call_is_encode_and_decode():
    vae, x = conv_vae(), torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = vae.encode(x).latent_dist
    assert torch.equal(vae(x).sample, vae.decode(posterior.mode()).sample)
    drawn = vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(3), return_dict=False)[0]
    z = posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(drawn, vae.decode(z, generator=torch.Generator()).sample)


def test_slices_are_the_whole():
    vae, x = conv_vae(), torch.rand(3, 3, 32, 32) * 2 - 1
    whole = vae(x).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae(x).sample, whole)
    vae.disable_slicing()
    assert not vae.use_slicing


def test_large_images_are_taken_in_parts(monkeypatch):
    """As many at once as MOST_PIXELS hold, on the way in and out: 64 of 1,024 px would need many GiB."""
    vae, x = conv_vae(), torch.rand(5, 3, 32, 32) * 2 - 1
    whole = vae(x).sample
    monkeypatch.setattr(model, "MOST_PIXELS", 2 * 32 * 32 + 1)
    seen = []
    for network in (vae.encoder, vae.decoder):
        network.register_forward_hook(lambda _, arguments, out: seen.append(len(out)))
    torch.testing.assert_close(vae(x).sample, whole)
    assert seen == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize(("tile", "made"), [((8, 8), (32, 32)), ((32, 32), (8, 8)), ((8, 6), (16, 12))])
def test_tiles_of_a_function_of_places_are_the_whole(tile, made):
    """Where each place depends on itself alone, blending changes nothing."""
    up = made[0] / tile[0]

    def function(x):
        size = [int(side * up) for side in x.shape[2:]]
        return torch.nn.functional.interpolate(x, size=size, mode="nearest") ** 2

    x = torch.rand(2, 3, 2 * tile[0] + 4, 3 * tile[1])
    found = tiled(function, x, tile, made)
    torch.testing.assert_close(found, function(x))
    with pytest.raises(ValueError, match="tiles of"):
        tiled(function, x[:, :, : tile[0] - 1], tile, made)


@pytest.mark.parametrize("fold", [1, 2])
def test_a_conv_head_takes_larger_images_whole_and_in_tiles(fold):
    vae, x = conv_vae(fold), torch.rand(1, 3, 64, 48) * 2 - 1
    whole = vae(x).sample
    one = vae(x[:, :, :32, :32]).sample
    vae.enable_tiling()
    parts = vae(x).sample
    assert whole.shape == parts.shape == x.shape and (whole - parts).abs().mean() < 0.05
    torch.testing.assert_close(vae(x[:, :, :32, :32]).sample, one)


def test_a_linear_head_is_not_tiled():
    vae = DeepVAE(1, 16, channels=(8,), latent_shape=(4, 1, 1))
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 16
    with pytest.raises(ValueError, match="a linear head sees the whole image"):
        vae.enable_tiling()


def counting(sizes):
    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    return pack


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient():
    kept, gradients = [], []
    for checkpointing in (False, True):
        vae, x = conv_vae().train(), torch.rand(2, 3, 32, 32)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        sizes: list[int] = []
        kept.append(sizes)
        with torch.autograd.graph.saved_tensors_hooks(counting(sizes), lambda t: t):
            logits, _, _ = vae(x, noise=torch.ones(2, 4, 8, 8))
        logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in vae.parameters()])
    assert sum(kept[1]) < sum(kept[0]) / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
