"""Hostile files are data, never code; a manifest leads nowhere else; nothing leaves the machine unless
asked."""

import json
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shared.doctor
import shared.generate
import shared.publish
import shared.report
import stage1_vae.encode
import stage1_vae.train
import stage2_diffusion.train
from shared import disk, recipe
from shared.config import InputError
from shared.data import latents, shard
from shared.training import checkpoint
from tests.conftest import ENCODE, TRAIN1, TRAIN2, call, command, train_all

FEW = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


# ---------------------------------------------------------------- pickles


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def bomb(mark: Path) -> bytes:
    import pickle

    return pickle.dumps(Bomb(mark))


def everything_done_with(run: Path, config_path: Path) -> None:
    """Every command on a run, each of which may refuse what it finds, in one line."""
    for main, flags in (
        (stage1_vae.train.main, ["--config", config_path, "stage1.max_steps=9"]),
        (stage1_vae.encode.main, ["--run", run]),
        (stage2_diffusion.train.main, ["--config", config_path, "stage2.max_steps=9"]),
        (shared.generate.main, ["--run", run, "--num-images", "1", "--num-steps", "1"]),
        (shared.generate.main, ["--run", run / "pipeline", "--num-images", "1", "--num-steps", "1"]),
    ):
        try:
            call(main, *flags)
        except InputError as error:
            assert "\n" not in str(error)


def files_of_a_run(run: Path) -> list[str]:
    """Every file that some command reads: those of the newest checkpoints, the cache, the pipeline, and the
    recipe."""
    files = [p.relative_to(run).as_posix() for p in sorted(run.rglob("*")) if p.is_file()]
    return [f for f in files if "step_00000004" not in f and not f.endswith((".png", ".jsonl"))]


def test_a_pickle_in_the_place_of_any_file_is_never_run(tiny, trained, tmp_path):
    mark, recipe_path = tmp_path / "mark", tiny()
    for file in files_of_a_run(trained):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        (tmp_path / "run" / file).write_bytes(bomb(mark))
        everything_done_with(tmp_path / "run", recipe_path)
        assert not mark.exists(), file


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "diffusion_pytorch_model.bin",
        "custom_checkpoint_0.pkl",
        "optimizer.bin",
        "conftest.py",
    ],
)
def test_a_pickle_or_a_program_beside_the_files_is_never_run(tiny, trained, tmp_path, name):
    mark, run = tmp_path / "mark", tmp_path / "run"
    shutil.copytree(trained, run)
    for folder in [run, *(p for p in run.rglob("*") if p.is_dir())]:
        (folder / name).write_bytes(
            f"open({str(mark)!r}, 'w')".encode() if name.endswith(".py") else bomb(mark)
        )
    everything_done_with(run, tiny())
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "train.parquet", "images/0.png", "images/dataset.py"])
def test_a_pickle_in_the_place_of_data_is_never_run(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mark, path = tmp_path / "mark", tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".npz"):
        np.savez(path, x=np.array([Bomb(mark)] * 4, dtype=object))
    elif name == "x.npy":
        np.save(path, np.array([Bomb(mark)] * 4, dtype=object), allow_pickle=True)
    else:
        path.write_bytes(f"open({str(mark)!r}, 'w')".encode() if name.endswith(".py") else bomb(mark))
    source = path.parent if name.startswith("images") else path
    with pytest.raises(InputError):
        call(stage1_vae.train.main, "--config", tiny(data={"source": str(source), "image_size": 16}))
    assert not mark.exists() and not (tmp_path / "run").exists()


def test_a_recipe_is_data(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "r.yaml").write_text(f"name: !!python/object/apply:builtins.open ['{mark}', 'w']\n")
    with pytest.raises(InputError):
        recipe.load(tmp_path / "r.yaml")
    assert not mark.exists()


# ---------------------------------------------------------------- paths and links


OUTSIDE = ["../../secret", "/etc/passwd", "a/../../../secret", "link"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_manifests_and_shard_lists_lead_nowhere_else(trained, tmp_path, name):
    (tmp_path / "secret").write_text("x")
    for folder, manifest, inner in (
        (trained / "latents", "manifest.json", "files"),
        (trained / "pipeline", "MANIFEST.json", "files"),
    ):
        copy = tmp_path / f"{folder.name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / "link").symlink_to(tmp_path / "secret")
        tree = json.loads((copy / manifest).read_text())
        tree[inner][name] = {"size": 1, "sha256": disk.sha256(tmp_path / "secret")}
        (copy / manifest).write_text(json.dumps(tree))
        with pytest.raises(InputError, match="points outside"):
            latents.verify(copy) if folder.name == "latents" else call(
                shared.generate.main, "--run", copy, "--num-images", "1"
            )


def test_a_link_in_the_place_of_a_file_or_a_checkpoint_is_refused(trained, tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(trained, run)
    shutil.copytree(trained, elsewhere)
    for path in (
        run / "latents" / "train" / "00000.safetensors",
        run / "pipeline" / "vae" / "config.json",
        run / "stage1_vae" / "checkpoints" / "step_00000008" / "training.json",
        run / "stage2_diffusion" / "checkpoints" / "step_00000008",
    ):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(elsewhere / path.relative_to(run))
    with pytest.raises(InputError, match="points outside"):
        latents.verify(run / "latents")
    with pytest.raises(InputError, match="points outside"):
        call(shared.generate.main, "--run", run / "pipeline", "--num-images", "1")
    for stage in ("stage1_vae", "stage2_diffusion"):
        assert checkpoint.newest(run / stage / "checkpoints").name == "step_00000004"
    assert "points outside" in (said := capsys.readouterr().out) and "a link leads out of the run" in said


# ---------------------------------------------------------------- fuzzed files


def safetensors_file(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


HOSTILE_HEADERS = {
    "a header larger than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of 200 MB": struct.pack("<Q", 200 << 20) + b"{}",
    "overlapping tensors": safetensors_file(
        b'{"moments":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"label":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        b"\0" * 12,
    ),
    "a tensor beyond the end": safetensors_file(
        b'{"moments":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}', b"\0" * 8
    ),
    "negative offsets": safetensors_file(
        b'{"moments":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', b"\0" * 8
    ),
    "a shape that does not fit": safetensors_file(
        b'{"moments":{"dtype":"F32","shape":[9,9],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "another dtype": safetensors_file(
        b'{"moments":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "no such tensor": safetensors_file(
        b'{"other":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "a duplicate key": safetensors_file(
        b'{"moments":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"moments":{"dtype":"F32","shape":[400],"data_offsets":[0,1600]}}',
        b"\0" * 8,
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_HEADERS)
def test_hostile_headers_of_shards_are_refused(tmp_path, kind):
    (tmp_path / "s.safetensors").write_bytes(HOSTILE_HEADERS[kind])
    with pytest.raises(InputError, match="s.safetensors"):
        shard.mapped(tmp_path / "s.safetensors", "moments")


@FEW
@given(data=st.data())
def test_a_fuzzed_shard_is_read_or_refused(tmp_path, data):
    path = tmp_path / "s.safetensors"
    save_file({"moments": torch.arange(24.0).view(3, 2, 2, 2)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        tensor = shard.mapped(path, "moments")
        assert tensor.nbytes <= len(content)
    except InputError as error:
        assert "\n" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"size": JSON, "sha256": JSON})


@FEW
@given(
    tree=JSON
    | st.fixed_dictionaries({"files": JSON | st.dictionaries(st.text(max_size=12), ENTRY | JSON, max_size=3)})
)
def test_a_fuzzed_manifest_is_a_fault_or_harmless(tmp_path, tree):
    folder = tmp_path / "step_00000001"
    folder.mkdir(exist_ok=True)
    (folder / disk.MANIFEST).write_text(json.dumps(tree))
    assert all(isinstance(fault, str) for fault in disk.faults(folder))
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(InputError):
        latents.open_cache(tmp_path).split("train")


LINES = st.sampled_from(
    [
        "name: x",
        "seed: 1",
        "data: {source: digits}",
        "stage2: null",
        "stage1: {max_steps: 5}",
        "- a",
        "&a [*a]",
        "!!x y",
        "? z",
    ]
)


@FEW
@given(text=st.lists(LINES | st.text(max_size=20), max_size=5).map("\n".join))
def test_a_fuzzed_recipe_is_read_or_refused_in_one_line(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    try:
        recipe.load(tmp_path / "r.yaml", needs_images=False)
    except InputError as error:
        assert "\n" not in str(error) and ("r.yaml" in str(error) or ": " in str(error))


@FEW
@given(
    key=st.sampled_from(
        ["seed", "data.source", "stage1.optim.betas", "stage1.model.latent_shape", "tracking.with", "stage2"]
    ),
    value=st.text(max_size=12),
)
def test_a_fuzzed_override_is_read_or_refused_in_one_line(tmp_path, key, value):
    (tmp_path / "r.yaml").write_text("name: x\nstage1: {max_steps: 5}\n")
    try:
        recipe.load(tmp_path / "r.yaml", [f"{key}={value}"], needs_images=False)
    except InputError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------- what leaves the machine


def test_nothing_is_sent_anywhere(tiny, tmp_path, monkeypatch):
    """Every command of a run, with the hub not forbidden: no name is looked up and no address outside is
    called.

    Only backbone weights (LPIPS, Inception) and data from the hub are ever fetched, where they are asked for.
    """
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("the network is not there")

    connect = socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda self, address: connect(self, address) if self.family == socket.AF_UNIX else refuse(address),
    )
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    from tests.conftest import write_images

    write_images(tmp_path / "photos", 30)
    train_all(tiny(data={"source": str(tmp_path / "photos"), "channels": 3, "image_size": 16}))
    run = tmp_path / "run"
    call(shared.generate.main, "--run", run)
    call(shared.generate.main, "--run", run / "pipeline", "--num-images", "2")
    call(shared.doctor.main, "--run", run)
    call(shared.report.main, "--run", run)
    call(shared.publish.main, "--run", run)
    assert asked == []


def test_no_token_is_written_anywhere(tiny, tmp_path):
    secrets = {
        name: f"secret-{number}-of-mine"
        for number, name in enumerate(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"))
    }
    home = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME")}
    environment = secrets | home | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    recipe_path = tiny(stage1__max_steps=2, stage2__max_steps=2)
    run, said = tmp_path / "run", ""
    for arguments in (
        (TRAIN1, "--config", recipe_path, "tracking.with=[wandb,tensorboard]"),
        (ENCODE, "--run", run),
        (TRAIN2, "--config", recipe_path, "tracking.with=[wandb,tensorboard]"),
        ("-m", "shared.generate", "--run", run),
    ):
        done = command(*arguments, **environment)
        said += done.stdout + done.stderr
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert len(written) > 100_000
    for secret in secrets.values():
        assert secret not in said and secret.encode() not in written
