"""What was computed and what was saved by the first version: later ones compute the same numbers and load the
same files."""

import json
import shutil

import numpy as np
import pytest

import shared.generate
import stage1_vae.train
import stage2_diffusion.train
from shared.data import latents, shard
from shared.training import checkpoint
from tests.conftest import ROOT, call, log

FIRST_FORMAT = (
    ROOT / "tests" / "promises" / "first_format"
)  # a run folder: three steps of each stage, of very small networks

LOSSES = {
    "stage1_vae": [
        1.068005,
        1.054372,
        1.022214,
        1.012269,
        1.014049,
        1.004792,
        1.004101,
        0.980239,
        1.03613,
        1.018253,
    ],
    "stage2_diffusion": [
        2.042877,
        2.338783,
        2.023858,
        2.003201,
        2.02849,
        2.084083,
        2.08467,
        1.905356,
        2.067048,
        1.950743,
    ],
}


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """Ten steps of both stages of the tiny recipe in fp32, and on latents in fp32; on one thread.

    In half precision, which the first version did not know, latents move the losses in the fifth digit.
    """
    import yaml

    from tests.conftest import TINY, train_all

    folder = tmp_path_factory.mktemp("golden")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"run_dir": str(folder / "run")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "ROUNDING", 0.0)
        train_all(
            folder / "tiny.yaml", "stage1.max_steps=10", "stage2.max_steps=10", "stage1.loss_weights.mse=0.5"
        )
    return folder / "run"


@pytest.mark.parametrize(
    ("stage", "key"), [("stage1_vae", "loss/total"), ("stage2_diffusion", "loss/denoising")]
)
def test_ten_losses_are_what_they_were(ten_steps, stage, key):
    assert [line[key] for line in log(ten_steps, stage)] == pytest.approx(LOSSES[stage], abs=1e-5)


def test_a_run_of_the_first_format_goes_on(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FIRST_FORMAT, run)
    for stage in ("stage1_vae", "stage2_diffusion"):
        assert checkpoint.step_of(checkpoint.newest(run / stage / "checkpoints")) == 3
    assert len(latents.open_cache(run / "latents").split("train")) == 29
    recipe = run / "recipe.yaml"
    expected = json.loads((run / "samples.json").read_text())
    call(shared.generate.main, "--run", run, "--num-images", "2")
    samples = np.load(run / "samples" / "samples.npz")["x"]
    assert np.abs(samples[:, 0, ::4, ::4].astype(int) - np.array(expected)).max() <= 1
    call(stage2_diffusion.train.main, "--config", recipe, f"run_dir={run}", "stage2.max_steps=5")
    call(stage1_vae.train.main, "--config", recipe, f"run_dir={run}", "stage1.max_steps=5")
    for stage in ("stage1_vae", "stage2_diffusion"):
        assert [line["step"] for line in log(run, stage)] == [4, 5]
        assert checkpoint.step_of(checkpoint.newest(run / stage / "checkpoints")) == 5
