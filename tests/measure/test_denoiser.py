"""The verdicts on samples, each by making the fault; and what a denoiser that knows nothing reaches."""

import copy
import json
import re

import pytest
import torch

from shared import doctor, run, trained
from shared.measure import denoiser
from stage2_diffusion.diffusion import make_path
from tests.conftest import call, train_all

SOUND = {
    "error": {
        "held_out": dict.fromkeys(map(str, denoiser.VALIDATION_TIMES), 0.7),
        "training": dict.fromkeys(map(str, denoiser.VALIDATION_TIMES), 0.69),
    },
    "error_chance": 0.01,
    "error_of_white_noise": {str(t): denoiser.unexplained("flow", t) for t in denoiser.VALIDATION_TIMES},
    "latents": {"variance": 1.0, "spectrum": [0.0, 3.0, 1.0]},
    "drawn": {"variance": 1.05},
    "unguided": {"variance": 0.97},
    "more_steps": {"variance": 1.0},
    "colour_drift": [0.01, -0.01, 0.0],
    "colour_error": [0.02, 0.02, 0.02],
    "still_learning": 0.01,
}


def changed(**changes):
    found = copy.deepcopy(SOUND)
    for key, value in changes.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    return found


def test_nothing_is_found_where_nothing_is_wrong():
    assert denoiser.verdicts(SOUND, {"samples": {"fid": 30.0}, "rfid": 10.0}) == []


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ({"still_learning": 0.05}, "undertrained: .*stage2.max_steps"),
        ({"error": {"held_out": dict.fromkeys(SOUND["error"]["training"], 0.9)}}, "overfitted: .*dropout"),
        ({"colour_drift": [0.1, 0.0, 0.0]}, "tinted: .*guidance_scale"),
        ({"unguided": {"variance": 0.7}, "drawn": {"variance": 0.7}}, "too few steps: .*sampling.num_steps"),
        ({"drawn": {"variance": 1.9}}, "guidance too strong: .*guidance_scale"),
    ],
)
def test_each_fault_has_its_verdict_and_no_other(fault, verdict):
    found = denoiser.verdicts(changed(**fault))
    assert len(found) == 1, found
    assert re.search(verdict, found[0])


@pytest.mark.parametrize(("held_out", "verdict"), [(0.8, "undertrained"), (1.0, "overfitted")])
def test_what_still_learns_is_not_overfitted_unless_its_errors_lie_far_apart(held_out, verdict):
    apart = {"held_out": dict.fromkeys(SOUND["error"]["training"], held_out)}
    (line,) = denoiser.verdicts(changed(error=apart, still_learning=0.05))
    assert line.startswith(verdict)


def test_what_few_held_out_latents_show_by_chance_is_not_overfitted():
    apart = {"held_out": dict.fromkeys(SOUND["error"]["training"], 0.9)}
    assert denoiser.verdicts(changed(error=apart, error_chance=0.08)) == []


def test_what_few_samples_show_by_chance_is_no_tint():
    assert denoiser.verdicts(changed(colour_drift=[0.1, 0.0, 0.0], colour_error=[0.04, 0.04, 0.04])) == []


def test_guidance_may_give_back_the_variance_that_few_steps_lose():
    assert denoiser.verdicts(changed(unguided={"variance": 0.77})) == []


def test_white_latents_of_which_the_denoiser_knows_nothing_are_too_rich():
    white = changed(latents={"spectrum": [0.0, 1.0, 0.9]})
    assert denoiser.verdicts(white) == []  # it can still tell them from noise
    white["error"] = dict.fromkeys(("held_out", "training"), white["error_of_white_noise"])
    assert [line.split(":")[0] for line in denoiser.verdicts(white)] == ["latents too rich"]


def test_the_vae_is_the_limit_where_reconstructions_are_as_bad_as_samples():
    (line,) = denoiser.verdicts(SOUND, {"samples": {"fid": 30.0}, "rfid": 28.0})
    assert line.startswith("the VAE is the limit: rFID 28 of FID 30")


@pytest.mark.parametrize("objective", ["flow", "v", "epsilon"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_white_noise_cannot_be_told_better_than_the_closed_form(objective, t):
    """Least squares on a hundred thousand numbers finds the same error."""
    key = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 1, 1, 1, 100_000, generator=key)
    z_t, target, _ = make_path(objective).noised(z, noise, torch.tensor([t]))
    slope = (z_t * target).mean() / z_t.square().mean()
    least = (target - slope * z_t).square().mean().item()
    assert least == pytest.approx(denoiser.unexplained(objective, t), rel=0.02)


# ---------------------------------------------------------------- on a run


@pytest.fixture
def opened(trained):
    folder, recipe = run.open_run(trained)
    return folder, recipe, _pipe(trained)


def _pipe(folder):
    return trained.open_pipeline(folder)


def test_a_run_is_examined_and_its_page_says_so(trained, capsys):
    call(doctor.main, "--run", trained)
    said = capsys.readouterr().out
    found = json.loads((trained / "report" / "doctor.json").read_text())["stage2"]
    assert found["error"]["training"].keys() == found["error_of_white_noise"].keys()
    assert len(found["colour_drift"]) == 1 and found["drawn"]["variance"] > 0
    assert "stage 2 (numbers in" in said and all(line in said for line in found["verdicts"])


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    folder = run.RunFolder(tmp_path)
    folder.stage("stage2").path.mkdir()
    lines = ['{"step": 100, "val/denoising": 1.2}', '{"step": 200, "val/denoising": 1.0}', '{"step": 3']
    folder.stage("stage2").metrics.write_text("\n".join(lines))
    assert denoiser.still_learning(folder) == pytest.approx(0.2)


def test_one_step_loses_variance_or_gains_it(opened):
    folder, recipe, pipe = opened
    few = copy.deepcopy(recipe)
    few.sampling.num_steps = 1
    many = copy.deepcopy(recipe)
    many.sampling.num_steps = 40
    shares = []
    for one in (few, many):
        found = denoiser.examine(folder, one, pipe, "cpu")
        shares.append(abs(1 - found["unguided"]["variance"] / found["more_steps"]["variance"]))
    assert shares[0] > 3 * shares[1]


def test_guidance_a_hundred_times_too_strong_is_seen(opened):
    folder, recipe, pipe = opened
    strong = copy.deepcopy(recipe)
    strong.sampling.guidance_scale = 100.0
    verdicts = denoiser.verdicts(denoiser.examine(folder, strong, pipe, "cpu"))
    assert any(line.startswith("guidance too strong") for line in verdicts)


def test_a_decoder_fed_shifted_latents_is_tinted(opened):
    folder, recipe, pipe = opened
    unet = pipe.unet
    original = unet.forward

    def biased(*args, **kwargs):
        out = original(*args, **kwargs)
        out.sample = out.sample - 20.0
        return out

    unet.forward = biased
    try:
        verdicts = denoiser.verdicts(denoiser.examine(folder, recipe, pipe, "cpu"))
    finally:
        unet.forward = original
    assert any(line.startswith("tinted") for line in verdicts)


def test_latents_of_a_vae_that_has_learned_nothing_are_too_rich(opened):
    verdicts = denoiser.verdicts(denoiser.examine(*opened, "cpu"))
    assert any(line.startswith("latents too rich") for line in verdicts), verdicts


LEARNS = {
    "stage1__loss_weights": {"l1": 1.0, "kl": 0.0001},
    "stage1__max_steps": 60,
    "stage2__unet": {"channels": [32, 64], "blocks_per_level": 1, "attention_levels": [], "head_dim": 8},
    "stage2__optim": {"name": "muon", "lr": 6e-3, "schedule": "cosine"},
    "stage2__ema": {"decay": 0.9},
    "stage2__save_every": 400,
    "stage2__preview_every": 400,
}


def test_a_training_that_has_hardly_begun_is_undertrained(tiny, tmp_path):
    train_all(tiny(**LEARNS, stage2__max_steps=40, stage2__validate_every=20))
    folder, recipe = run.open_run(tmp_path / "run")
    verdicts = denoiser.verdicts(denoiser.examine(folder, recipe, _pipe(tmp_path / "run"), "cpu"))
    assert any(line.startswith("undertrained") for line in verdicts), verdicts


def test_a_few_latents_seen_again_and_again_are_known_by_heart(tiny, tmp_path):
    few = {"source": "digits", "image_size": 16, "limit": 48, "val_fraction": 0.75}
    train_all(tiny(data=few, **LEARNS, stage2__max_steps=400, stage2__validate_every=100))
    folder, recipe = run.open_run(tmp_path / "run")
    found = denoiser.examine(folder, recipe, _pipe(tmp_path / "run"), "cpu")
    verdicts = denoiser.verdicts(found)
    assert any(line.startswith("overfitted") for line in verdicts), (found["error"], verdicts)
    assert not any(line.startswith("too few steps") for line in verdicts)
    recipe.sampling.num_steps = 1  # the mean of all
    blurred = denoiser.examine(folder, recipe, _pipe(tmp_path / "run"), "cpu")
    assert any(line.startswith("too few steps") for line in denoiser.verdicts(blurred)), blurred
