"""A pipeline given away: its card, a copy, and an upload to a stand-in of the hub."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import stage2_diffusion.train
from shared import config, disk, generate, publish, recipe
from shared.config import InputError
from shared.run import model_of
from shared.sampling.pipeline import LatentDiffusionPipeline
from shared.show.card import card
from tests.conftest import call


@pytest.fixture
def finished(trained, tmp_path):
    """A run of its own with samples and figures."""
    folder = tmp_path / "digits_run"
    shutil.copytree(trained, folder)
    call(generate.main, "--run", folder, "--num-images", "4")
    (folder / "report").mkdir(exist_ok=True)
    figures = {"fid": 12.5, "kid": 0.01, "precision": 0.5, "recall": 0.25}
    found = {"samples": figures, "rfid": 3.0, "extractor": "own", "real_images": 7, "generated_images": 8}
    (folder / "report" / "metrics.json").write_text(json.dumps(found))
    return folder


def test_the_card_says_what_it_draws_how_well_and_how_it_is_loaded(finished, capsys):
    call(publish.main, "--run", finished, "--license", "cc-by-4.0")
    card = (finished / "pipeline" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: diffusers\n")
    told = (
        "images of 1x16x16 of 10 classes", "8 samples against 7 images (held out), by own", "| FID | 12.5 |",
        "trust_remote_code=True", "latents of 4x4x4", "![Samples](samples.png)", "source: digits",
    )  # fmt: skip
    for words in told:
        assert words in card, words
    assert str(finished.parent) not in card.split("## The recipe")[1]
    assert (finished / "pipeline" / "samples.png").is_file() and not disk.faults(finished / "pipeline")
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    assert len(pipe("1", generator=torch.Generator().manual_seed(0), num_inference_steps=2).images) == 1


def test_a_copy_elsewhere_leaves_the_run_as_it_was(finished, tmp_path):
    before = sorted(path.name for path in (finished / "pipeline").iterdir())
    call(publish.main, "--run", finished, "--out", tmp_path / "copy")
    assert sorted(path.name for path in (finished / "pipeline").iterdir()) == before
    assert (tmp_path / "copy" / "README.md").is_file() and not disk.faults(tmp_path / "copy")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="--out: .* holds no pipeline"):
        call(publish.main, "--run", finished, "--out", tmp_path / "other")


def test_a_run_without_a_pipeline_is_one_line(finished):
    shutil.rmtree(finished / "pipeline")
    with pytest.raises(InputError, match="no finished pipeline yet"):
        call(publish.main, "--run", finished)


HUB = "https://huggingface.co"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as an upload of small files needs."""

    uploaded: dict = {}
    private: bool | None = None

    def _answer(self, tree, code=200):
        body = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # noqa: N802
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "modelId": "me/mine"})

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)  # in the words of an older or a newer library
            Hub.private = asked.get("private") or asked.get("visibility") == "private"
            self._answer({"url": f"{HUB}/me/mine", "id": "me/mine", "name": "mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._answer({"files": told})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    Hub.uploaded[entry["value"]["path"]] = entry["value"]["content"]
            self._answer({"commitUrl": f"{HUB}/me/mine/commit/1", "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self._answer({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.uploaded = {}
    endpoint = f"http://127.0.0.1:{server.server_port}"
    import huggingface_hub

    make = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: make(endpoint=endpoint, token="hf_test"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield endpoint
    server.shutdown()


@pytest.mark.parametrize("private", [True, False])
def test_an_upload_takes_the_whole_folder(finished, hub, capsys, private):
    call(publish.main, "--run", finished, "--to", "me/mine", *["--private"] * private)
    assert bool(Hub.private) == private
    assert f"uploaded: {hub}/me/mine" in capsys.readouterr().out
    files = {
        path.relative_to(finished / "pipeline").as_posix() for path in (finished / "pipeline").rglob("*.*")
    }
    assert {
        "README.md",
        "pipeline.py",
        "samples.png",
        "unet/config.json",
        "vae/model.py",
    } <= Hub.uploaded.keys()
    assert Hub.uploaded.keys() >= {name for name in files if (finished / "pipeline" / name).is_file()}


def test_without_a_network_it_is_one_line_and_the_folder_is_ready(finished, monkeypatch):
    import huggingface_hub

    make = huggingface_hub.HfApi
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: make(endpoint="http://127.0.0.1:9", token="hf_test")
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="--to: me/mine: .*is ready") as told:
        call(publish.main, "--run", finished, "--to", "me/mine")
    assert "\n" not in str(told.value) and (finished / "pipeline" / "README.md").is_file()


def test_a_wrong_name_is_one_line(finished):
    with pytest.raises(InputError, match="--to: 'me/my/model' is no name of a repository"):
        call(publish.main, "--run", finished, "--to", "me/my/model")


def test_the_card_s_code_runs(finished, tmp_path):
    call(publish.main, "--run", finished)
    card = (finished / "pipeline" / "README.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
        assert (tmp_path / "sample.png").stat().st_size
        (tmp_path / "sample.png").unlink()


@pytest.mark.parametrize("where", ["run", "copy"])
def test_an_edited_card_and_a_foreign_file_stay(finished, tmp_path, capsys, where):
    """Through any number of publications, and an export that is made anew."""
    out = finished / "pipeline" if where == "run" else tmp_path / "copy"
    words = ("--run", finished, *(() if where == "run" else ("--out", out)))
    call(publish.main, *words)
    (out / "LICENSE").write_text("mine")
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("# digits_run", "# Numbers"))
    for turn in range(3):
        if turn == 2 and where == "run":
            call(stage2_diffusion.train.main, "--config", finished / "recipe.yaml", f"run_dir={finished}")
        call(publish.main, *words)
        assert "was edited and stays" in capsys.readouterr().out
        assert "# Numbers" in (out / "README.md").read_text()
        assert (out / "LICENSE").read_text() == "mine" and not disk.faults(out)
    (out / "README.md").unlink()
    call(publish.main, *words)
    assert (out / "README.md").read_text() == card


def test_a_card_of_an_earlier_version_is_ours(finished):
    """It was sealed with the weights, and had no mark."""
    for text, kept in (("# of old", False), ("# of old, edited", True)):
        (finished / "pipeline" / "README.md").write_text("# of old")
        (finished / "pipeline" / disk.MANIFEST).unlink()
        disk.seal(finished / "pipeline")
        (finished / "pipeline" / "README.md").write_text(text)
        call(publish.main, "--run", finished)
        assert ("# of old" in (finished / "pipeline" / "README.md").read_text()) is kept
        assert not disk.faults(finished / "pipeline")


def test_a_copy_over_weights_saved_by_hand_is_the_run_s(finished, tmp_path):
    pipe = LatentDiffusionPipeline.from_pretrained(finished / "pipeline")
    pipe.unet.conv_in.weight.data.zero_()
    pipe.save_pretrained(tmp_path / "copy")
    call(publish.main, "--run", finished, "--out", tmp_path / "copy")
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "copy")
    assert pipe.unet.conv_in.weight.abs().max() > 0 and not disk.faults(tmp_path / "copy")


def test_damaged_weights_are_not_published(finished, tmp_path):
    weights = finished / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="safetensors was changed; run its last train command"):
        call(publish.main, "--run", finished, "--out", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_older_pipeline_is_not_published_under_a_newer_recipe(finished, tmp_path):
    """A longer training was stopped: recipe and samples are its, the pipeline is not."""
    newest = max((finished / "stage2_diffusion" / "checkpoints").glob("step_*"))
    manifest = newest / disk.MANIFEST
    content = manifest.read_text()
    listed = json.loads(content)["files"]["unet/diffusion_pytorch_model.safetensors"]["sha256"]
    manifest.write_text(content.replace(listed, "0" * 64))
    with pytest.raises(InputError, match="is of other weights than step_.*last train command to its end"):
        call(publish.main, "--run", finished, "--out", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_card_without_a_denoiser_or_with_latents_of_another_shape(tiny):
    settings = config.flatten(recipe.load(tiny(), [], False))
    vae = {"latent_shape": [4, 8, 8], "posterior": "deterministic"}
    alone = card("x", "x", "", settings, {"unet": [None, None]}, vae, {}, None, False)
    assert "an autoencoder with latents of 4x8x8." in alone and "latent diffusion" not in alone
    assert "UNet" not in alone and "latent-diffusion" not in alone
    both = card("x", "x", "", settings, {"unet": ["diffusers", "UNet2DModel"]}, {}, {}, None, False)
    assert "A latent diffusion model" in both and "latents of 4x4x4, and a UNet on these." in both


def test_the_card_names_no_place_of_this_machine(tiny, tmp_path):
    found = recipe.load(
        tiny(stage1__init=str(tmp_path), stage2__init=str(tmp_path / "gone" / "a")), [], False
    )
    text = config.dump(recipe.without_places(found))
    assert str(tmp_path) not in text and "init: a" in text


def test_figures_of_an_earlier_model_are_not_its_own(finished):
    figures = finished / "report" / "metrics.json"
    found = json.loads(figures.read_text())
    newest = max((finished / "stage2_diffusion" / "checkpoints").glob("step_*"))
    for model, shown in ((model_of(newest), True), ("another", False)):
        figures.write_text(json.dumps(found | {"model": model}))
        call(publish.main, "--run", finished)
        assert ("| FID | 12.5 |" in (finished / "pipeline" / "README.md").read_text()) is shown
