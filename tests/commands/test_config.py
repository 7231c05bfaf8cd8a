"""Wrong configuration: one line that names the key and the cure, exit code 2, before torch is imported."""

import dataclasses
import re
import resource
import subprocess
import sys
import types
import typing

import pytest
from omegaconf import OmegaConf

from shared import config, recipe
from shared.config import InputError
from tests.conftest import ROOT, TRAIN1, clean_environment, command


def load(path, *overrides):
    return recipe.load(path, overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage1.optim.lrr=1", ["stage1.optim.lrr", "Did you mean: 'lr'"]),
        ("stage1.optim.lr=fast", ["stage1.optim.lr", "fast"]),
        ("stage1.optim.lr=-1", ["stage1.optim.lr", "more than 0", "-1"]),
        ("stage1.optim.lr=.nan", ["stage1.optim.lr", "finite"]),
        ("stage1.model.head=dense", ["stage1.model.head", "linear, conv, identity", "dense"]),
        ("stage1.max_epochs=3", ["max_steps", "exactly one"]),
        ("stage1.grad_accumulation=3", ["batch_size", "divisible by grad_accumulation"]),
        ("stage1.loss_weights.l1=0", ["loss_weights.l1", "no term compares"]),
        ("stage1.loss_weights.hurdle=1", ["loss_weights.hurdle", "set both or neither"]),
        ("stage1.model.output_activation=hurdle", ["loss_weights.hurdle", "set both or neither"]),
        ("stage1.model.latent_shape=[4,4]", ["latent_shape", "[c, h, w]"]),
        ("stage1.model.latent_shape=[4,8,8]", ["latent_shape", "[4, 4]"]),
        ("data.image_size=18", ["data.image_size", "18", "divisible by 4"]),
        ("data.source=no/such/folder", ["data.source", "no/such/folder"]),
        ("data.source=digit", ["data.source", "did you mean 'digits'"]),
        ("stage2.unet.channels=[16,32,32,32]", ["stage2.unet.channels", "halved 3 times"]),
        ("stage2.unet.attention_levels=[2]", ["attention_levels", "no level 2"]),
        ("stage2.unet.head_dim=5", ["head_dim", "5"]),
        ("sampling.sampler=ddim", ["sampling.sampler", "euler or heun or dpmpp"]),
        ("sampling.guidance_interval=[0.7,0.1]", ["sampling.guidance_interval", "[low, high]"]),
        ("sampling.shift=0", ["sampling.shift", "0.1"]),
        ("tracking.with=[wanda]", ["tracking.with", "wandb, tensorboard"]),
        ("name=a/b", ["name", "a/b"]),
        ("seed", ["seed", "key.sub=value"]),
        ("configs/digits.yaml", ["configs/digits.yaml", "a recipe is named by --config"]),
        ("stage2.unet=[", ["stage2.unet=["]),
    ],
)
def test_one_line_names_the_key_and_the_cure(tiny, override, words):
    with pytest.raises(InputError) as caught:
        load(tiny(), override)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("guide_at", "unconditional"), [(None, False), (0.5, True)])
def test_guidance_wants_something_to_lead_away_from(tiny, guide_at, unconditional):
    keys = {"guidance_scale": 2.0, "unconditional_guide": unconditional}
    path = tiny(stage2__label_dropout=0, stage2__guide_at=guide_at, sampling=keys)
    with pytest.raises(InputError, match="stage2.label_dropout: at 0 there is nothing to guide away from"):
        load(path)
    for cure in ("stage2.label_dropout=0.1", "sampling.guidance_scale=1", "data.label_column=null"):
        load(path, cure)
    load(path, "stage2.guide_at=0.16", "sampling.unconditional_guide=false")


def test_only_the_straight_path_has_steps_to_shift(tiny):
    keys = ("sampling.shift=2", "stage2.objective=v", "sampling.sampler=ddim")
    load(tiny(), keys[0])
    with pytest.raises(InputError, match="sampling.shift: moves the steps of objective flow"):
        load(tiny(), *keys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line"),
        ("- 1\n- 2", "mapping"),
        ("name: x\nname: y", "duplicate"),
        ("nmae: x", "Did you mean: 'name'"),
        ("", "name"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert words.lower() in str(caught.value).lower()


def fields(schema, prefix=""):
    """(key, type) of every leaf of a schema."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        options = (
            [k for k in typing.get_args(kind) if k is not type(None)]
            if isinstance(kind, types.UnionType)
            else [kind]
        )
        key = f"{prefix}{field.name.rstrip('_')}"
        if dataclasses.is_dataclass(options[0]):
            yield from fields(options[0], f"{key}.")
        else:
            yield key, options[0]


LEAVES = dict(fields(recipe.Recipe))


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_refuses_a_wrong_type(tiny, key):
    kind = LEAVES[key]
    wrong = "{a: 1}" if kind is str else "[[x]]" if typing.get_origin(kind) is list else "word"
    with pytest.raises(InputError):
        load(tiny(), f"{key}={wrong}")


@pytest.mark.parametrize(
    "key", [k for k, kind in LEAVES.items() if kind in (int, float) or typing.get_origin(kind) is list]
)
def test_every_number_refuses_an_absurd_value(tiny, key):
    wrong = "[-7]" if typing.get_origin(LEAVES[key]) is list else "-.inf" if LEAVES[key] is float else "-7"
    with pytest.raises(InputError) as caught:
        load(tiny(), f"{key}={wrong}")
    assert key.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.image_size=[]", "image_size: must be one whole number"),
        ("data.image_size=[64]", "image_size: must be one whole number"),
        ("data.image_size=null", "image_size: must be"),
        ("data.value_transform.kind=null", "kind: must be one of"),
        ("data.value_transform.scale=null", "scale: must be a finite number"),
    ],
)
def test_a_key_of_several_types_refuses_none_and_nothing(tiny, change, said):
    with pytest.raises(InputError, match=said):
        load(tiny(), change)


def test_a_list_for_a_mapping_names_the_key(tiny, tmp_path):
    with pytest.raises(InputError, match=r"command line: stage1.model.channels\[0\]: "):
        load(tiny(), "stage1.model.channels[0]=64")
    (tmp_path / "list.yaml").write_text("name: x\nstage1: {max_steps: 1, optim: [adamw]}\n")
    with pytest.raises(InputError, match="list.yaml: stage1: "):
        load(tmp_path / "list.yaml")


def test_a_home_that_nobody_has_is_a_folder_s_name(tiny):
    changed = load(tiny(), "run_dir=~nobody-of-this-name/a")
    assert str(changed.run) == "~nobody-of-this-name/a"
    done = command(TRAIN1, "--config", tiny(), "data.source=~nobody-of-this-name", check=False)
    assert done.returncode == 2 and "no such file or folder: ~nobody-of-this-name" in done.stderr


def test_every_field_of_every_schema_has_help():
    def explain(schema):
        hints = typing.get_type_hints(schema)
        for field in dataclasses.fields(schema):
            assert field.metadata.get("help"), f"{schema.__name__}.{field.name}"
            for kind in [hints[field.name], *typing.get_args(hints[field.name])]:
                if dataclasses.is_dataclass(kind):
                    explain(kind)

    explain(recipe.Recipe)


def test_what_is_written_reads_back_equal(tiny, tmp_path):
    first = load(tiny(), "tracking.with=[tensorboard]", "stage1.optim.lr=1e-4")
    (tmp_path / "again.yaml").write_text(config.dump(first))
    assert load(tmp_path / "again.yaml") == first
    assert first.stage1.optim.lr == 1e-4 and first.tracking.with_ == ["tensorboard"]


@pytest.mark.parametrize(
    "name", ["1e5", "1.5e3", "1.e5", "-1e-3", "007", "no", "null", "a: b", "2020-01-01", "it's", "1_000"]
)
def test_names_that_look_like_something_else_are_read_back(name):
    tree = OmegaConf.create(f"a: {config.yaml_value(name)}")
    assert tree.a == name


def test_overrides_of_the_interface(tiny):
    changed = load(
        tiny(),
        "stage1.max_steps=40",
        "stage1.save_every=5",
        "stage1.optim.lr=1e-4",
        "stage1.loss_weights.kl=0.02",
        "run_dir=runs/b",
    )
    assert (changed.stage1.max_steps, changed.stage1.save_every, changed.stage1.optim.lr) == (40, 5, 1e-4)
    assert changed.stage1.loss_weights.kl == 0.02 and str(changed.run) == "runs/b"


def test_differences_name_the_keys():
    assert config.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


@pytest.mark.parametrize(
    "arguments",
    [["stage1.optim.lrr=1"], ["data.image_size=18"], ["data.source=no/such/folder"], ["--nonsense"]],
)
def test_from_the_command_line_in_under_two_seconds(tiny, arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(TRAIN1, "--config", tiny(), *arguments, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # other tests beside this one do not count
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2 and taken < 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_comes_without_torch():
    done = command("-X", "importtime", TRAIN1, "--help")
    assert "--config" in done.stdout and not re.search(r"\| +torch(\.|$)", done.stderr, re.MULTILINE)


def test_launch_sh_answers_a_wrong_recipe_with_2(tiny):
    import subprocess

    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    done = subprocess.run([ROOT / "launch.sh", tiny(), "stage1.optim.lrr=1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


MACHINE = {  # of some GPUs: what launch.sh asks it, and the processes that it starts there
    "nvidia-smi": "exit 0",
    "sleep": "exit 0",
    "python": """case "$*" in
    *"pip install"*) echo once >>"$COUNT"; [ "$(wc -l <"$COUNT")" -ge "$SUCCEEDS" ] || exit 2 ;;
    *device_count*) echo $GPUS ;;
    *train.py*"$FAILS"*) exit 1 ;;
    *shared.recipe*) exec "$REAL" "$@" ;;
    *accelerate.commands.launch*) echo "$7 $(basename "${12}")" ;;
    *) echo "1 $(basename "$1")" ;;
esac""",
}


def launched(folder, *words, installed=True, **environment):
    """What launch.sh does on such a machine."""
    import subprocess

    bin_ = folder / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name, body in MACHINE.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    (folder / "launch.sh").write_text((ROOT / "launch.sh").read_text())
    (folder / "launch.sh").chmod(0o755)
    (folder / "configs").mkdir()
    for name in ("pyproject.toml", "configs/constraints.txt"):
        (folder / name).write_text("")
    if installed:
        found = subprocess.check_output(["cksum"], input=b"").decode().strip()
        (folder / ".venv" / ".installed").write_text(f"{found} {folder}\n")
    known = {"GPUS": 1, "FAILS": "nothing", "COUNT": folder / "count", "SUCCEEDS": 1} | environment
    place = {"REAL": sys.executable, "PYTHONPATH": str(ROOT)}
    all_of_it = clean_environment(**{name: str(value) for name, value in known.items()}, **place)
    all_of_it["PATH"] = f"{bin_}:{all_of_it['PATH']}"
    all_of_it.pop("CUDA_VISIBLE_DEVICES", None)  # its GPUs are not hidden
    return subprocess.run(
        [folder / "launch.sh", *words], cwd=folder, env=all_of_it, capture_output=True, text=True
    )


@pytest.mark.parametrize(("succeeds", "code"), [(3, 0), (4, 1)])
def test_launch_sh_installs_again_where_a_network_failed(tmp_path, succeeds, code):
    done = launched(tmp_path, "test", installed=False, SUCCEEDS=succeeds)
    assert done.returncode == code and done.stderr.count("once more") == 2
    assert (tmp_path / ".venv" / ".installed").is_file() == (code == 0)
    assert ("error: not installed" in done.stderr) == (code == 1)


def test_launch_sh_trains_stage_2_alone_on_latents_from_elsewhere(tiny, tmp_path):
    """No VAE of which nothing is used, and no images."""
    recipe = tiny(data={"source": "nowhere/at/all", "image_size": 16})
    done = launched(tmp_path, recipe, f"stage2.latents={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train.py") == 1 and "encode.py" not in done.stdout
    words = ("sweep", recipe, "stage2.optim.lr=1e-3,1e-4", f"stage2.latents={tmp_path}")
    done = launched(tmp_path / "sweep", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train.py") == 2


def test_a_sweep_goes_on_after_a_run_that_failed(tiny, tmp_path):
    done = launched(tmp_path, "sweep", tiny(), "stage1.loss_weights.kl=0.02,0.2,2.0", FAILS="kl=0.2 ")
    assert done.returncode == 1
    assert done.stdout.count("train.py") == 4, done.stdout
    assert done.stderr.endswith(f"error: not finished: {tmp_path}/run-kl-0.2\n")


def test_a_plan_on_several_machines_is_one_line(tmp_path):
    done = launched(tmp_path, "photos", "--minutes", "5", SLURM_NNODES=2)
    assert done.returncode == 2 and done.stderr.startswith("error: a plan is of one machine")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_launch_sh_says_before_it_plans_that_a_gpu_is_not_used(tmp_path):
    done = launched(tmp_path, "photos", "--minutes", "5", GPUS=0)
    assert done.stderr.startswith("warning: PyTorch cannot use this machine's GPU")
    assert done.stderr.count("warning") == 1


@pytest.mark.parametrize(
    ("gpus", "stage1", "stage2"), [(1, 1, 1), (2, 2, 2), (3, 3, 2), (5, 4, 4), (7, 6, 4), (8, 6, 8)]
)
def test_launch_sh_takes_as_many_gpus_as_share_a_batch(tiny, tmp_path, gpus, stage1, stage2):
    """Evenly, and at least 8 images each: of batches of 48 and 64."""
    recipe = tiny(stage1__batch_size=96, stage1__grad_accumulation=2)
    done = launched(tmp_path, recipe, "stage2.batch_size=64", GPUS=gpus)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{stage1} train.py" and lines[2] == f"{stage2} train.py"


def test_launch_sh_answers_options_itself():
    """They were taken for what a recipe says: stages and a run folder."""
    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("launch.sh has not installed here")
    for arguments in (
        ["configs/digits.yaml", "--help"],
        ["demo", "--help"],
        ["sweep", "a.yaml", "b=1,2", "-h"],
    ):
        done = subprocess.run([ROOT / "launch.sh", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("usage: python -m shared.recipe"), done.stderr
