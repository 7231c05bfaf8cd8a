"""`init`: a stage begins from the weights of a run, an export or a checkpoint; what does not fit is named."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import stage1_vae.train
import stage2_diffusion.train
from shared.config import InputError
from shared.training import checkpoint
from tests.conftest import averaged, call, log, write_images

STILL = ["stage1.optim.lr=1e-30", "stage1.optim.weight_decay=0", "stage1.max_steps=1"]
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def begin(config, init, *flags) -> None:
    call(stage1_vae.train.main, "--config", config, f"stage1.init={init}", *STILL, *flags)


@pytest.mark.parametrize("what", ["", "stage1_vae/checkpoints/step_00000004", "pipeline"])
def test_a_run_a_checkpoint_and_an_export_are_begun_from(tiny, trained, tmp_path, what, capsys):
    begin(tiny(), trained / what)
    newest = checkpoint.newest(trained / "stage1_vae" / "checkpoints")
    expected = load_file((trained / what if what else newest) / WEIGHTS)
    for name, tensor in averaged(tmp_path / "run", "stage1_vae").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    assert f"{len(expected)} tensors" in capsys.readouterr().out


def test_what_does_not_fit_is_named_and_left(tiny, trained, tmp_path, capsys):
    """Colour photographs from a model of grey digits: all but the first and the last layer."""
    write_images(tmp_path / "photos", 20)
    config = tiny(data={"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16})
    begin(config, trained)
    said = capsys.readouterr().out
    assert "not taken: encoder.0.0.weight ([8, 1, 3, 3] there, [8, 3, 3, 3] here)" in said
    found = averaged(tmp_path / "run", "stage1_vae")
    expected = averaged(trained, "stage1_vae")
    assert found["encoder.0.0.weight"].shape == (8, 3, 3, 3)
    torch.testing.assert_close(
        found["to_moments.weight"], expected["to_moments.weight"], atol=1e-6, rtol=1e-5
    )


def test_what_has_no_place_is_named_and_of_many_tensors_their_number(tiny, trained, capsys):
    deeper = ["stage1.model.channels=[8,16,16]", "stage1.model.latent_shape=[16,2,2]"]
    begin(tiny(), trained, *deeper)
    assert re.search(r"tensors; not taken: .* and \d+ more", capsys.readouterr().out)
    newest = checkpoint.newest(trained / "stage1_vae" / "checkpoints")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    taken, left = checkpoint.fill(model, newest / WEIGHTS)
    given = load_file(newest / WEIGHTS)
    assert taken == 0 and len(left) == len(given) + 2
    assert "encoder.0.0.weight (no place here)" in left and "0.weight (not there)" in left


def test_a_wrong_beginning_of_stage_2_is_told_before_stage_1_is_trained(tiny, tmp_path):
    for flag in ([], ["--dry-run"]):
        with pytest.raises(InputError, match="stage2.init: .*nowhere is no checkpoint"):
            call(stage1_vae.train.main, "--config", tiny(stage2__init=str(tmp_path / "nowhere")), *flag)
    assert not (tmp_path / "run" / "stage1_vae" / "checkpoints").exists()


def test_stage_2_with_a_guide(tiny, trained, tmp_path):
    config = tiny(stage2__latents=str(trained / "latents"), stage2__init=str(trained), stage2__guide_at=0.5)
    still = [flag.replace("stage1", "stage2") for flag in STILL]
    call(stage2_diffusion.train.main, "--config", config, *still)
    expected = averaged(trained, "stage2_diffusion")
    folder = checkpoint.newest(tmp_path / "run" / "stage2_diffusion" / "checkpoints")
    for network in ("unet", "guide"):
        found = load_file(folder / network / "diffusion_pytorch_model.safetensors")
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_a_resume_begins_from_its_own_checkpoint(tiny, trained, tmp_path):
    config = tiny()
    begin(config, trained)
    begin(config, tmp_path / "nowhere", "stage1.max_steps=2")  # it is read at the start only
    assert [line["step"] for line in log(tmp_path / "run", "stage1_vae")] == [1, 2]


def test_a_damaged_or_foreign_folder_is_one_line(tiny, trained, tmp_path):
    config = tiny()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="stage1.init: .*empty is no checkpoint, no export and no run"):
        begin(config, tmp_path / "empty")
    with pytest.raises(InputError, match="init: .*nowhere is no checkpoint"):
        begin(config, tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "pipeline", damaged)
    content = bytearray((damaged / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (damaged / WEIGHTS).write_bytes(content)
    with pytest.raises(
        InputError, match="init: .*damaged: vae/diffusion_pytorch_model.safetensors was changed"
    ):
        begin(config, damaged)
    with pytest.raises(InputError, match="stage1.init: nothing of .* fits the vae"):
        wide = [
            "stage1.model.channels=[24,40]",
            "stage1.model.latent_shape=[5,4,4]",
            "stage1.model.block=plain",
        ]
        write_images(tmp_path / "photos", 20)
        colour = [f"data.source={tmp_path}/photos", "data.channels=3", f"run_dir={tmp_path}/other"]
        begin(config, trained, *wide, *colour)
