"""A pretrained autoencoder of diffusers as the first stage: what it computes, and what of it is trained."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shared.recipe
import stage1_vae.encode
import stage1_vae.train
from shared import disk, trained
from shared.config import InputError
from shared.data.config import DataConfig
from shared.data.latents import open_cache
from shared.training import checkpoint
from stage1_vae.config import ModelConfig
from stage1_vae.pretrained import make_vae
from tests.commands.test_generate import ELSEWHERE
from tests.conftest import averaged, call, command, log, train_all

SIZE = 16
NETWORKS = {
    "AutoencoderKL": lambda channels: diffusers.AutoencoderKL(
        channels, channels, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 16),
        latent_channels=4, norm_num_groups=4, sample_size=SIZE,
    ),
    "AutoencoderTiny": lambda channels: diffusers.AutoencoderTiny(
        channels, channels, (8, 8), (8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    ),
    "AutoencoderDC": lambda channels: diffusers.AutoencoderDC(
        channels, 4, 8, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    ),
}  # fmt: skip
GAUSSIAN = {"AutoencoderKL"}


def saved(folder, kind, channels=1):
    torch.manual_seed(0)
    network = NETWORKS[kind](channels).eval()
    network.save_pretrained(folder)
    return network


def recipe(tiny, folder, train, kind="AutoencoderKL", **changes):
    weights = {"l1": 1.0, "kl": 0.001 if kind in GAUSSIAN else 0.0}
    model = {"pretrained": str(folder), "train": train}
    return tiny(stage1__model=model, stage1__loss_weights=weights, **changes)


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_it_computes_what_diffusers_does(kind, tmp_path):
    network = saved(tmp_path, kind)
    data = DataConfig(source="digits", image_size=[SIZE, 2 * SIZE], channels=1)
    vae = make_vae(ModelConfig(pretrained=str(tmp_path)), data)
    x = torch.rand(2, 1, SIZE, 2 * SIZE) * 2 - 1
    found = network.encode(x, return_dict=False)[0]
    expected = found.mean if kind in GAUSSIAN else found
    mean, logvar = vae.moments(x)
    assert torch.equal(mean, expected) and tuple(vae.config.latent_shape) == mean.shape[1:]
    assert vae.deterministic == (kind not in GAUSSIAN)
    assert torch.equal(logvar, found.logvar) if kind in GAUSSIAN else logvar.max() == -30
    torch.testing.assert_close(vae.decode(mean).sample, network.decode(expected, return_dict=False)[0])


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("train", ["all", "decoder", "nothing"])
def test_only_what_was_asked_for_is_trained(kind, train, tiny, tmp_path):
    before = saved(tmp_path / "vae", kind).state_dict()
    call(stage1_vae.train.main, "--config", recipe(tiny, tmp_path / "vae", train, kind))
    after = averaged(tmp_path / "run", "stage1_vae")
    moved = {name for name, value in before.items() if not torch.equal(value, after[f"network.{name}"])}
    if train == "nothing":
        assert not moved and [line["step"] for line in log(tmp_path / "run", "stage1_vae")] == [0]
    else:
        assert any(name.startswith("decoder") for name in moved)
        assert any("encoder" in name or name.startswith("quant") for name in moved) == (train == "all")


def test_encoding_alone_leads_to_samples(tiny, tmp_path):
    """Stage 1 trains nothing, twice; stage 2, sampling and the export go on from there."""
    saved(tmp_path / "vae", "AutoencoderKL")
    path = recipe(tiny, tmp_path / "vae", "nothing")
    call(stage1_vae.train.main, "--config", path)
    first = (tmp_path / "run/stage1_vae/checkpoints/step_00000000/MANIFEST.json").read_bytes()
    train_all(path)
    assert (tmp_path / "run/stage1_vae/checkpoints/step_00000000/MANIFEST.json").read_bytes() == first
    pipes = [trained.open_pipeline(tmp_path / folder) for folder in ("run", "run/pipeline")]
    assert pipes[0].latent_shape == (4, 8, 8)
    options = {"labels": torch.arange(6), "batch_size": 6, "num_inference_steps": 3}
    one, other = (pipe(**options).values.astype(int) for pipe in pipes)
    assert one.shape == (6, 1, SIZE, SIZE) and (one == other).all()
    where = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command("-c", ELSEWHERE, tmp_path / "run/pipeline", tmp_path / "x.npy", **where)
    assert abs(np.load(tmp_path / "x.npy").astype(int) - one).max() <= 1


@pytest.mark.parametrize("flag", ["--dry-run", "--estimate"])
def test_a_denoiser_that_does_not_take_its_latents_is_refused_before_it_trains(tiny, tmp_path, flag):
    saved(tmp_path / "vae", "AutoencoderKL")
    path = recipe(tiny, tmp_path / "vae", "all", stage2__unet__channels=[8] * 5)
    command = (
        (shared.recipe.main, path) if flag == "--estimate" else (stage1_vae.train.main, "--config", path)
    )
    with pytest.raises(InputError, match="stage2.unet.channels: latents of 8x8 cannot be halved 4 times"):
        call(*command, flag)


def test_its_latents_have_statistics_of_channels_whatever_head_the_recipe_names(tiny, tmp_path):
    saved(tmp_path / "vae", "AutoencoderKL")
    path = recipe(tiny, tmp_path / "vae", "nothing")
    call(stage1_vae.train.main, "--config", path, "stage1.model.head=linear")
    call(stage1_vae.encode.main, "--run", tmp_path / "run")
    codec = open_cache(tmp_path / "run" / "latents").manifest["codec"]
    assert np.shape(codec["mean"]) == np.shape(codec["std"]) == (4, 1, 1)


def test_a_killed_training_goes_on_to_the_same_bits(tiny, tmp_path):
    saved(tmp_path / "vae", "AutoencoderKL")
    path = recipe(tiny, tmp_path / "vae", "decoder", stage1__optim={"name": "muon", "lr": 1e-3})
    call(stage1_vae.train.main, "--config", path, f"run_dir={tmp_path / 'whole'}")
    call(stage1_vae.train.main, "--config", path, "stage1.max_steps=4")
    call(stage1_vae.train.main, "--config", path)
    files = [checkpoint.newest(tmp_path / run / "stage1_vae/checkpoints") for run in ("run", "whole")]
    one, other = (disk.read_tensors(file / "training.safetensors") for file in files)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(place, **changes):
    data = DataConfig(**{"source": "digits", "image_size": SIZE, "channels": 1} | changes)
    with pytest.raises(InputError) as raised:
        make_vae(ModelConfig(pretrained=str(place)), data)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bad_ones_are_one_line(tmp_path):
    saved(tmp_path, "AutoencoderKL")
    assert "is for 1 channels: set data.channels" in refusal(tmp_path, channels=3)
    assert "image_size: 15 is not divisible by 2" in refusal(tmp_path, image_size=15)
    assert "cannot be opened" in refusal(tmp_path / "nowhere/at-all")
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in disk.read_tensors(weights).items()}
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be opened" in refusal(tmp_path)
    name = "decoder.conv_in.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    assert f"weights are missing, such as {name}" in refusal(tmp_path)
    weights.unlink()
    assert "cannot be opened" in refusal(tmp_path)
    diffusers.UNet2DModel(8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                          up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path)  # fmt: skip
    assert "it holds UNet2DModel, not AutoencoderKL or" in refusal(tmp_path)


def test_a_vae_within_a_pipeline_s_folder_is_found(tmp_path):
    saved(tmp_path / "vae", "AutoencoderTiny")
    data = DataConfig(source="digits", image_size=SIZE, channels=1)
    vae = make_vae(ModelConfig(pretrained=str(tmp_path)), data)
    assert vae.config.kind == "AutoencoderTiny"


def test_a_deterministic_one_has_no_kl(tiny, tmp_path):
    saved(tmp_path / "vae", "AutoencoderTiny")
    path = recipe(tiny, tmp_path / "vae", "all", "AutoencoderTiny")
    with pytest.raises(InputError, match="stage1.loss_weights.kl: .* has no KL: set it to 0"):
        call(stage1_vae.train.main, "--config", path, "stage1.loss_weights.kl=0.1")
    assert not (tmp_path / "run").exists()


def test_what_the_template_says_of_training_does_not_matter_where_nothing_is_trained(tiny, tmp_path, capsys):
    """Neither its adversarial term nor its lack of steps, in a trial, too."""
    saved(tmp_path / "vae", "AutoencoderKL")
    path = recipe(tiny, tmp_path / "vae", "nothing")
    words = ("--config", path, "stage1.loss_weights.adversarial=0.05", "stage1.max_steps=null")
    call(stage1_vae.train.main, *words, "--dry-run")
    assert "all of it works" in capsys.readouterr().out
    call(stage1_vae.train.main, *words)
    assert [line["step"] for line in log(tmp_path / "run", "stage1_vae")] == [0]
