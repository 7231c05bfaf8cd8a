"""What a user of diffusers types from habit: the call, its output, schedulers, parts, folders."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from shared import generate
from shared.sampling.folders import CODE, VAE_CODE
from shared.sampling.pipeline import LatentDiffusionPipeline
from tests.conftest import call, clean_environment


@pytest.fixture
def pipe(trained):
    pipe = LatentDiffusionPipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def test_a_generator_is_reproducible_and_a_list_draws_each_image_by_itself(pipe):
    one, again, other = (pipe([1, 2], generator=seeded(n)).values for n in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    listed = pipe([1, 2], generator=[seeded(5), seeded(6)]).values
    alone = pipe(2, generator=seeded(6)).values
    assert np.abs(listed[1].astype(int) - alone[0]).max() <= 1


def test_classes_by_number_name_list_and_tensor(pipe):
    names = pipe.config.classes
    given = (3, names[3], [3], [names[3]], torch.tensor([3]))
    values = [pipe(labels, generator=seeded()).values for labels in given]
    assert all(np.array_equal(value, values[0]) for value in values)
    assert pipe.id2label[3] == names[3] and pipe.get_label_ids([names[3], names[0]]) == [3, 0]
    assert len(pipe([1, 2], num_images_per_prompt=3).images) == 6
    assert len(pipe(3, latents=torch.randn(4, *pipe.latent_shape)).images) == 4


def test_latents_are_where_it_begins(pipe):
    noise = pipe.noises(0, 2)
    expected = pipe([1, 2], seed=0).values
    assert np.array_equal(pipe([1, 2], latents=noise).values, expected)
    assert np.array_equal(pipe(labels=[1, 2], noise=noise).values, expected)  # the earlier names


def test_outputs_of_every_type(pipe):
    found = {kind: pipe([1, 2], seed=0, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert [image.size for image in found["pil"].images] == [(16, 16)] * 2
    assert found["np"].images.shape == (2, 16, 16, 1) and found["np"].images.min() >= 0
    assert found["pt"].images.shape == (2, 1, 16, 16) and found["pt"].images.max() <= 1
    assert found["latent"].images.shape == (2, *pipe.latent_shape)
    assert torch.equal(found["latent"].images, found["np"].latents)
    back = np.asarray(found["pil"].images[0], dtype=float) / 255
    assert np.abs(back - found["np"].images[0, :, :, 0]).max() <= 0.5 / 255 + 1e-6
    (alone,) = pipe([1, 2], seed=0, output_type="np", return_dict=False)
    assert np.array_equal(alone, found["np"].images) and np.array_equal(found["np"][0], alone)


def test_the_callback_sees_every_step_and_may_change_and_stop(pipe):
    seen = []

    def watch(pipe, index, t, tensors):
        seen.append((index, float(t), tensors["latents"].shape))
        return {}

    plain = pipe(1, seed=0, num_inference_steps=4, callback_on_step_end=watch).latents
    assert [index for index, _, _ in seen] == [0, 1, 2, 3] and pipe.num_timesteps == 4
    assert all(before > after for (_, before, _), (_, after, _) in zip(seen, seen[1:], strict=False))

    def zero(pipe, index, t, tensors):
        return {"latents": tensors["latents"] * 0}

    moved = pipe(1, seed=0, num_inference_steps=4, callback_on_step_end=zero).latents
    assert not torch.equal(moved, plain)

    def stop(pipe, index, t, tensors):
        seen.append(index)
        pipe._interrupt = True
        return {}

    seen.clear()
    pipe(1, seed=0, num_inference_steps=4, callback_on_step_end=stop)
    assert seen == [0] and pipe.interrupt


def test_a_callback_may_end_the_guidance(pipe):
    def plain_from_here(pipe, index, t, tensors):
        pipe._guidance_scale = 1.0
        return {}

    options = {"seed": 0, "num_inference_steps": 4}
    guided = pipe(1, guidance_scale=3.0, **options).latents
    ended = pipe(1, guidance_scale=3.0, callback_on_step_end=plain_from_here, **options).latents
    never = pipe(1, guidance_scale=1.0, **options).latents
    assert not torch.equal(ended, guided) and not torch.equal(ended, never)


def test_the_interval_of_guidance_is_an_argument(pipe):
    options = {"seed": 0, "guidance_scale": 3.0, "num_inference_steps": 4}
    never = pipe(1, guidance_start=0.0, guidance_end=0.0, **options).latents
    assert torch.equal(never, pipe(1, **options | {"guidance_scale": 1.0}).latents)
    assert not torch.equal(never, pipe(1, **options).latents)


def test_an_export_samples_as_its_recipe_did(trained, tmp_path, pipe):
    """Steps and scale travel: a call that says nothing draws what generate draws for the run."""
    call(generate.main, "--run", trained, "--num-images", "4", "--out", tmp_path / "run")
    call(generate.main, "--run", trained / "pipeline", "--num-images", "4", "--out", tmp_path / "export")
    of_run, of_export = (np.load(tmp_path / name / "samples.npz")["x"] for name in ("run", "export"))
    assert np.array_equal(of_run, of_export)
    drawn = pipe([0, 1, 2, 3], seed=0).values
    assert np.abs(drawn.astype(int) - of_run.astype(int)).max() <= 1
    expected = {"num_inference_steps": 3, "guidance_scale": 1.0, "unconditional_guide": False}
    assert pipe.config.sampling == expected


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"class_labels": "eleven"}, "no class 'eleven'; there are 0, 1"),
        ({"class_labels": [99]}, r"class_labels: \[99\]; classes go from 0 to 9"),
        ({"latents": torch.randn(1, 3, 3, 3)}, "latents: .* begin from"),
        ({"num_inference_steps": 0}, "num_inference_steps: at least 1"),
        ({"output_type": "jpeg"}, "output_type: pil, np, pt, latent, not 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "is none of"),
    ],
)
def test_what_does_not_fit_is_one_line(pipe, arguments, line):
    with pytest.raises(ValueError, match=line) as told:
        pipe(**arguments)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        lambda: DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        lambda: FlowMatchHeunDiscreteScheduler(shift=1.0),
    ],
    ids=["UniPC", "DEIS", "Heun"],
)
def test_other_schedulers_of_diffusers_come_to_the_same_picture(pipe, make, tmp_path):
    """On the same path: with many steps they agree with Euler; saved and loaded they draw the same."""
    options = {"class_labels": [1, 2, 3], "seed": 0, "num_inference_steps": 100}
    expected = pipe(**options).latents
    pipe.scheduler = make()
    found = pipe(**options).latents
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    pipe.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    assert torch.equal(again(**options).latents, found)


def test_a_scheduler_that_draws_is_reproducible_by_the_generator(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler(prediction_type="epsilon")
    one, again, other = (pipe(1, latents=pipe.noises(0, 1), generator=seeded(n)).latents for n in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_parts_are_passed_in_and_unknown_words_are_refused(trained, pipe):
    heun = FlowMatchHeunDiscreteScheduler(shift=1.0)
    other = LatentDiffusionPipeline.from_pretrained(trained / "pipeline", scheduler=heun, vae=pipe.vae)
    assert other.scheduler is heun and other.vae is pipe.vae
    with pytest.raises(TypeError, match="from_pretrained: varriant is not known"):
        LatentDiffusionPipeline.from_pretrained(trained / "pipeline", varriant="fp16")


def test_the_vae_says_its_statistics_as_those_of_diffusers_do(pipe, trained):
    config = pipe.vae.config
    assert config.scaling_factor == 1.0 and len(config.latents_mean) == pipe.latent_shape[0]
    z = pipe(1, seed=0).latents
    numbers = (config.latents_mean, config.latents_std)
    mean, std = (torch.tensor(list(value)).view(1, -1, 1, 1) for value in numbers)
    normalised = (z - mean) / std
    codec = pipe.config.codec
    assert torch.allclose(normalised * torch.tensor(codec["std"]) + torch.tensor(codec["mean"]), z, atol=1e-5)


def test_no_pickle_is_ever_written(pipe, tmp_path):
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


def test_an_upload_begins_when_the_folder_is_whole(pipe, tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, repo_id, **options):
        uploaded[repo_id] = sorted(path.name for path in (tmp_path / "mine").rglob("*.py"))

    monkeypatch.setattr(LatentDiffusionPipeline, "push_to_hub", upload)
    pipe.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
    assert uploaded == {"me/mine": sorted([*CODE, *VAE_CODE])}


HABITS = """
import sys
absent = ("shared", "stage1_vae", "stage2_diffusion", "einops", "datasets")
sys.modules.update({name: None for name in absent})
import numpy as np
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.float32)
pipe = pipe.to("cpu")
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
image = pipe(generator=generator).images[0]
image.save(sys.argv[2] + "/one.png")
images = pipe(["1", "2"], num_images_per_prompt=2, guidance_scale=2.0, num_inference_steps=4).images
assert len(images) == 4
array = pipe(class_labels=[1], output_type="np", generator=generator).images
assert array.shape[0] == 1 and array.shape[-1] in (1, 3, 4)
tensor = pipe(class_labels=torch.tensor([1]), output_type="pt").images
latents = pipe(class_labels=1, output_type="latent").images
assert isinstance(tensor, torch.Tensor) and latents.shape[1:] == tuple(pipe.vae.config.latent_shape)
assert len(pipe(1, return_dict=False)) == 1
steps = []
def on_step_end(pipe, step, timestep, callback_kwargs):
    steps.append(int(step))
    return callback_kwargs
tensors = ["latents"]
pipe(1, num_inference_steps=5, callback_on_step_end=on_step_end, callback_on_step_end_tensor_inputs=tensors)
assert steps == list(range(5))
pipe.scheduler = UniPCMultistepScheduler.from_config(
    pipe.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True
)
pipe(1, num_inference_steps=5)
print(pipe.components.keys(), pipe.config.classes, pipe.id2label[1], pipe.vae.config.scaling_factor)
constants = {key: pipe.config[key] for key in ("codec", "value_transform", "classes")}
other = type(pipe)(**pipe.components, **constants)
other.set_progress_bar_config(disable=True)
assert np.array_equal(
    *(one(1, generator=torch.Generator().manual_seed(3), num_inference_steps=4, guidance_scale=1.0).values
      for one in (pipe, other))
)
pipe.to(torch.bfloat16)
pipe(1, num_inference_steps=2).images[0].save(sys.argv[2] + "/half.png")
pipe.save_pretrained(sys.argv[2] + "/again")
again = DiffusionPipeline.from_pretrained(sys.argv[2] + "/again", trust_remote_code=True)
"""


def test_a_script_of_habits_runs_where_this_package_is_not(trained, tmp_path):
    environment = clean_environment(HF_MODULES_CACHE=str(tmp_path / "modules"))
    arguments = [sys.executable, "-c", HABITS, trained / "pipeline", tmp_path]
    subprocess.run(arguments, check=True, cwd=tmp_path, env=environment)
