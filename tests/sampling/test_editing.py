"""Laws of edits: what strength 0 and 1 give, what lies between, what a mask keeps."""

import io

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from shared.data.config import DataConfig
from shared.data.images import decode
from shared.sampling import editing, tasks
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.sampling.schedulers import make_scheduler
from shared.sampling.transforms import ValueTransform
from shared.show import grids
from stage2_diffusion.diffusion import make_path


@pytest.fixture
def pipe(trained):
    pipe = LatentDiffusionPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))


def test_strength_0_is_the_reconstruction(pipe, picture):
    raw = torch.from_numpy(np.array(picture)).float()[None, None]
    pixels = raw / 127.5 - 1
    expected = pipe.values(pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample)
    found = pipe(3, image=picture, strength=0.0, seed=0).values
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_strength_1_is_a_fresh_sample(pipe, picture):
    """That of Euler's method, for the straight path leaves nothing of an image at its end."""
    pipe.scheduler = make_scheduler("flow", "euler")
    fresh = pipe(3, seed=0, num_inference_steps=20).latents
    found = pipe(3, image=picture, strength=1.0, seed=0, num_inference_steps=20).latents
    assert torch.allclose(found, fresh, atol=1e-4)


def test_the_stronger_the_farther(pipe, picture):
    strengths = (0.0, 0.2, 0.5, 0.8, 1.0)
    z = [pipe([1, 2, 3], image=picture, strength=strength, seed=0).latents for strength in strengths]
    distances = [(one - z[0]).square().mean().item() for one in z]
    assert distances[0] == 0 and distances == sorted(distances)


def test_outside_of_a_mask_everything_stays_to_the_grey_level(pipe, picture):
    mask = np.zeros((16, 16), np.float32)
    mask[4:12, 8:] = 1
    given = np.asarray(picture)
    out = pipe([1, 2], image=picture, mask_image=mask, seed=0)
    inside = mask > 0.5
    for values, image in zip(out.values, out.images, strict=True):
        assert np.array_equal(values[0][~inside], given[~inside])
        assert np.array_equal(np.asarray(image)[~inside], given[~inside])
        assert (values[0][inside] != given[inside]).mean() > 0.5
    assert not np.array_equal(out.values[0], out.values[1])
    again = pipe([1, 2], image=picture, mask_image=Image.fromarray((mask * 255).astype(np.uint8)), seed=0)
    assert np.array_equal(again.values, out.values)


def test_no_batch_changes_what_is_painted(pipe, picture):
    mask = np.zeros((16, 16), np.float32)
    mask[:, 8:] = 1
    edit = {"image": picture, "mask_image": mask, "strength": None, "num_inference_steps": 3}
    labels = torch.tensor([1, 2, 3])
    together, alone, other = (
        tasks.gathered(tasks.edited(pipe, edit, seed, 3, labels, 1.0, size, PartialState()))[0]
        for seed, size in ((0, 3), (0, 1), (1, 3))
    )
    assert (together.int() - alone.int()).abs().max() <= 1 and not torch.equal(together, other)
    said = pipe([1, 2, 3], image=picture, mask_image=mask, seed=0, num_inference_steps=3, guidance_scale=1.0)
    assert np.array_equal(said.values, together)


def test_a_pretrained_autoencoder_says_its_size(pipe, tmp_path):
    from diffusers import AutoencoderKL

    from shared.data.config import DataConfig
    from stage1_vae.pretrained import open_pretrained

    channels = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
    AutoencoderKL(block_out_channels=[8], norm_num_groups=4, sample_size=16, **channels).save_pretrained(
        tmp_path
    )
    pipe.vae = open_pretrained(str(tmp_path), DataConfig(source="digits", channels=3, image_size=16))
    assert editing.drawn_size(pipe) == (3, [16, 16])


class Knows:
    """A denoiser for the Gaussian N(0, 1) in every latent, in closed form."""

    def __call__(self, z, t):
        time = t / 1000
        return (2 * time - 1) / ((1 - time) ** 2 + time**2) * z


@pytest.mark.parametrize("objective", ["flow", "epsilon", "v"])
def test_a_noised_image_is_taken_apart_as_training_puts_it_together(objective):
    scheduler = make_scheduler(objective, "dpmpp")
    z, noise = torch.randn(2, 3, 4, 2, 2)
    for t in (0.1, 0.5, 0.9):
        z_t, target, _ = make_path(objective).noised(z, noise, torch.full((3,), t))
        alpha, sigma = editing.levels(scheduler, t)
        assert torch.allclose(z_t, alpha * z + sigma * noise, atol=1e-5)
        clean, rest = editing.split(scheduler, z_t, target, alpha, sigma)
        assert torch.allclose(clean, z, atol=1e-3) and torch.allclose(rest, noise, atol=1e-3)


def test_painting_into_a_gaussian_keeps_its_variance(pipe):
    """With the exact denoiser of white latents what is painted is N(0, 1), what is known stays."""
    z = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    cells = torch.zeros(64, 1, 4, 4, dtype=torch.bool)
    cells[..., 2:] = True
    begin = editing.Start(z, z, z, 1.0, cells, cells)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    pipe.scheduler = make_scheduler("flow", "euler")
    key = torch.Generator().manual_seed(2)
    drawn = editing.redraw(pipe, begin, noise, lambda t: Knows(), 50, key)
    assert torch.equal(drawn[..., :2], z[..., :2])
    assert drawn[..., 2:].var().item() == pytest.approx(1, abs=0.12)
    assert (drawn[..., 2:] * z[..., 2:]).mean().abs() < 0.05


@pytest.mark.parametrize("objective", ["flow", "epsilon", "v"])
def test_an_image_goes_to_its_noise_and_comes_back(pipe, objective):
    """The path of the exact denoiser is followed both ways; fine steps bring back what began."""
    pipe.scheduler = make_scheduler(objective, "euler" if objective == "flow" else "dpmpp")
    answer = knowing(objective, pipe.scheduler)
    z = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.5
    noise = editing.invert(pipe, z, answer, 200)
    again = editing.redraw(pipe, editing.Start(z, z, z, 1.0), noise, lambda t: answer, 200)
    assert (again - z).square().mean().sqrt() < 0.03 * z.std()
    alpha, sigma = editing.levels(pipe.scheduler, 1.0)  # for N(0, 1) the path keeps every distance
    assert noise.std().item() == pytest.approx(z.std().item() * (1 - alpha) / sigma, rel=0.05)


def knowing(objective, scheduler):
    """The exact denoiser of N(0, 1) for any objective: what it expects of z and of the noise."""
    if objective == "flow":
        return Knows()

    def answer(z, t):
        alpha, sigma = editing.levels(scheduler, t.item() / 1000)
        clean, rest = alpha * z, sigma * z
        return rest if objective == "epsilon" else alpha * rest - sigma * clean

    return answer


def test_outpainting_is_a_mask_around(pipe, picture):
    """What lies around a picture is drawn, and the picture stays."""
    around = np.ones((16, 16), np.float32)
    around[4:12, 4:12] = 0
    values = pipe(2, image=picture, mask_image=around, seed=1).values[0, 0]
    given = np.asarray(picture)
    assert np.array_equal(values[4:12, 4:12], given[4:12, 4:12])
    assert (values[around > 0] != given[around > 0]).mean() > 0.5


def test_an_array_is_edited_in_its_own_units(pipe):
    x = np.full((1, 16, 16), 200.0, np.float32)
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1
    values = pipe(1, image=x, mask_image=mask, seed=0).values
    assert np.array_equal(values[0, :, :, :8], x[:, :, :8])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"strength": 1.5}, "strength: between 0"),
        ({"image": np.zeros((3, 16, 16))}, r"image: \(3, 16, 16\); this model draws \(1, 16, 16\)"),
        ({"mask_image": np.zeros((8, 8))}, r"mask_image: 1 of \(1, 8, 8\); the images want \(1, 16, 16\)"),
        (
            {"mask_image": np.zeros((3, 1, 16, 16)), "class_labels": [1, 2]},
            "mask_image: 3 of .*, one for all or",
        ),
        ({"image": np.zeros((3, 1, 16, 16)), "class_labels": [1, 2]}, "image: 3 of them for"),
    ],
)
def test_what_does_not_fit_an_edit_is_one_line(pipe, picture, arguments, line):
    with pytest.raises(ValueError, match=line):
        pipe(**{"image": picture} | arguments)


def test_a_picture_shows_a_model_of_arrays_values_as_its_samples_are_shown():
    transform = ValueTransform("log1p", 0.0, 5000.0, scale=10.0)
    levels = np.array([[0, 128], [200, 255]], np.uint8)
    values = editing.values_of(Image.fromarray(levels), transform, 1, [2, 2])
    assert values.min() == 0 and values.max() == pytest.approx(5000, rel=1e-4)
    assert np.array_equal(np.asarray(grids.single(transform(values)[0])), levels)


def test_pictures_and_masks_of_16_bits_keep_their_grey_levels(pipe):
    deep = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    grey = ValueTransform("range", 0.0, 255.0, integer=True)
    found = editing.values_of(Image.fromarray(deep), grey, 1, [16, 16])
    assert torch.allclose(found[0, 0], torch.from_numpy(deep / 257.0).float(), atol=1e-3)
    mask = Image.fromarray(np.where(np.arange(16) > 7, 65535, 257).astype(np.uint16)[None].repeat(16, 0))
    values = pipe(1, image=Image.fromarray(deep), mask_image=mask, seed=0).values
    assert (np.abs(values[0, 0, :, :8] - deep[:, :8] / 257.0) <= 1).all()


def test_a_mask_is_bright_where_it_shows_bright_not_where_it_is_transparent(pipe, picture):
    layer = np.zeros((16, 16, 4), np.uint8)
    layer[:, 8:] = 255  # white strokes on nothing
    values = pipe(1, image=picture, mask_image=Image.fromarray(layer), seed=0).values[0, 0]
    assert np.array_equal(values[:, :8], np.asarray(picture)[:, :8])


def test_colours_under_transparency_are_what_training_makes_them():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 100, 50, 255)
    grey = ValueTransform("range", 0.0, 255.0, integer=True)
    found = editing.values_of(Image.fromarray(rgba), grey, 4, [4, 4])[0]
    assert torch.allclose(found[:3].float().mean((1, 2)), torch.tensor([200.0, 100.0, 50.0]), atol=4)
    trained_on = decode(_png(rgba), DataConfig(image_size=4, channels=4))
    assert np.array_equal(trained_on, found.numpy())


def _png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [2, 4])
def test_a_picture_is_no_field_of_two_or_four_channels(channels):
    kelvin = ValueTransform("minmax", [270.0] * channels, [300.0] * channels)
    with pytest.raises(ValueError, match=f"a model of {channels} channels begins from arrays"):
        editing.values_of(Image.new("RGBA", (8, 8)), kelvin, channels, [8, 8])


def test_an_array_of_words_is_one_line(pipe):
    with pytest.raises(ValueError, match="image: an array of <U1; numbers are wanted"):
        pipe(image=np.full((1, 16, 16), "a"))


@pytest.mark.parametrize(("asked", "taken"), [(3, 3), (None, editing.EDIT_STEPS)])
def test_an_edit_takes_the_steps_that_it_is_asked_for(pipe, picture, asked, taken):
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(1, image=picture, seed=0, strength=0.5, guidance_scale=1.0, num_inference_steps=asked)
    assert len(calls) == taken


def test_a_list_of_arrays_is_a_batch(pipe):
    arrays = [np.full((1, 16, 16), level, np.float32) for level in (50, 200)]
    out = pipe(image=arrays, strength=0.0)
    assert np.array_equal(out.values, pipe(image=np.stack(arrays), strength=0.0).values)
    assert len(out.values) == 2
