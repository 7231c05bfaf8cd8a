"""Augmentation: symmetries and shifts are what they are called, and each image has its own."""

import shutil

import numpy as np
import pytest
import torch

import stage1_vae.encode
import stage1_vae.train
import stage2_diffusion.train
from shared.config import InputError
from shared.data import augment as augmenting
from shared.data import latents, sources, splits
from shared.data.augment import SYMMETRIES, Copies, augment, shifted
from shared.data.config import AugmentConfig, DataConfig
from shared.training.keyed import Rows
from tests.conftest import assert_equal_bits, call, log, training_tensors

X = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6).to(torch.uint8)


def drawn(symmetry: float, down: float = 0.5, right: float = 0.5) -> torch.Tensor:
    """The same numbers for both images of X; 0.5 is no shift."""
    return torch.tensor([[symmetry, down, right]] * 2)


def test_nothing_asked_for_changes_nothing():
    assert torch.equal(augment(X, AugmentConfig(), torch.rand(2, 3)), X)
    assert not AugmentConfig().active


def test_flips_are_flips():
    flipped = {
        "horizontal": X.flip(-1),
        "vertical": X.flip(-2),
        "both": X.flip(-1, -2),
        "dihedral": X.transpose(-1, -2).flip(-1, -2),
    }
    for flip, last in flipped.items():
        config = AugmentConfig(flip=flip)
        assert torch.equal(augment(X, config, drawn(0.0)), X)
        assert torch.equal(augment(X, config, drawn(0.999)), last), flip


def test_the_symmetries_of_a_square_are_eight_and_form_a_group():
    image = torch.rand(1, 1, 6, 6)
    table = torch.tensor(SYMMETRIES["dihedral"], dtype=torch.bool)
    images = augmenting.transformed(image.expand(8, -1, -1, -1), table)
    assert len({tuple(found.flatten().tolist()) for found in images}) == 8
    for found in images:  # one more symmetry of any of them is one of them
        again = augmenting.transformed(found[None].expand(8, -1, -1, -1), table)
        assert all(any(torch.equal(a, b) for b in images) for a in again)


def test_a_shift_moves_and_repeats_the_edge():
    config = AugmentConfig(shift=2)
    moved = augment(X, config, drawn(0, 0.999, 0.0))  # two down, two to the left
    assert torch.equal(moved[..., 2:, :-2], X[..., :-2, 2:])
    assert torch.equal(moved[..., 0, :-2], X[..., 0, 2:]) and torch.equal(moved[..., -1, -1], X[..., -3, -1])


def test_an_image_s_share_does_not_depend_on_the_others():
    """So the number of processes, and where a batch is cut, change nothing."""
    config = AugmentConfig(flip="dihedral", shift=2)
    x = torch.rand(12, 3, 8, 8)

    def share(start: int, stop: int) -> torch.Tensor:
        rows = Rows(0, 5, start, stop, 12, torch.device("cpu"))
        return augment(x[start:stop], config, rows.uniform("augment", 3))

    whole = share(0, 12)
    assert torch.equal(torch.cat([share(0, 4), share(4, 12)]), whole)
    assert not torch.equal(whole, x)


def test_every_symmetry_and_shift_comes_as_often():
    config = AugmentConfig(flip="both", shift=1)
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 1, 1] = 1
    found = augment(corner.expand(40_000, -1, -1, -1), config, torch.rand(40_000, 3)).mean(0)[0]
    # the lit pixel lies in one of 4 places, and then in one of the 9 around it
    assert found.sum() == pytest.approx(1.0) and found.min() > 0.02


def pixels(**augmentation) -> tuple[splits.Pixels, splits.Pixels, DataConfig]:
    data = DataConfig(
        source="digits", channels=1, image_size=16, limit=20, augment=AugmentConfig(**augmentation)
    )
    return *splits.split(sources.open_source(data), data), data


def test_copies_are_the_images_and_then_their_symmetries():
    train, _, data = pixels(flip="horizontal", copies=3)
    copies = Copies(train, data.augment)
    count = len(train)
    assert len(copies) == 3 * count
    batch = copies.__getitems__([0, count, 2 * count, count + 4])
    plain = train.__getitems__([0, 4])
    assert torch.equal(batch["raw"][0], plain["raw"][0]) and torch.equal(batch["raw"][2], plain["raw"][0])
    assert torch.equal(batch["raw"][1], plain["raw"][0].flip(-1))
    assert torch.equal(batch["raw"][3], plain["raw"][1].flip(-1))
    assert batch["label"].tolist() == plain["label"][[0, 0, 0, 1]].tolist()


def test_shifts_of_copies_are_always_the_same_and_never_of_the_first():
    train, _, data = pixels(shift=3, copies=4)
    everything = list(range(4 * len(train)))
    once, again = (Copies(train, data.augment).__getitems__(everything)["raw"] for _ in range(2))
    assert torch.equal(once, again)
    plain = train.__getitems__(list(range(len(train))))["raw"]
    assert torch.equal(once[: len(train)], plain)
    changed = [(part != plain).flatten(1).any(1).float().mean() for part in once.split(len(train))[1:]]
    assert min(changed) > 0.8  # one in 49 is not moved


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        ({"copies": 2}, "data.augment.copies: nothing makes 2 copies differ"),
        ({"shift": 8}, "data.augment.shift: 8 px is half of an image of 16"),
        ({"flip": "diagonal"}, "data.augment.flip: must be one of none, horizontal"),
    ],
)
def test_a_wrong_augmentation_is_one_line(tiny, augmentation, words):
    with pytest.raises(InputError, match=words):
        call(stage1_vae.train.main, "--config", tiny(data__augment=augmentation))


def test_the_cache_holds_the_copies_and_says_so(tiny, tmp_path):
    recipe = tiny(data__augment={"flip": "horizontal", "copies": 2}, stage1__max_steps=2, stage2__max_steps=2)
    call(stage1_vae.train.main, "--config", recipe)
    call(stage1_vae.encode.main, "--run", tmp_path / "run")
    cache = latents.open_cache(tmp_path / "run" / "latents")
    assert (len(cache.split("train")), len(cache.split("val"))) == (2 * 58, 6)
    made_of = latents.read_fingerprint(cache.folder)["data"]
    assert made_of["train"]["copies"] == 2 and "copies" not in made_of["val"]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    call(stage2_diffusion.train.main, "--config", recipe)
    assert len(log(tmp_path / "run", "stage2_diffusion")) == 2
    # Other copies are other latents, of the same VAE.
    other = [f"run_dir={tmp_path}/other", "data.augment.copies=3"]
    call(stage1_vae.train.main, "--config", recipe, *other)
    with pytest.raises(InputError, match="is stale"):
        call(stage1_vae.encode.main, "--run", tmp_path / "other")


def test_resume_with_augmentation_is_bit_equal(tiny, tmp_path):
    recipe = tiny(data__augment={"flip": "both", "shift": 2})
    call(stage1_vae.train.main, "--config", recipe, f"run_dir={tmp_path}/whole")
    for steps in (3, 8):
        call(stage1_vae.train.main, "--config", recipe, f"stage1.max_steps={steps}")
    whole, parts = (training_tensors(tmp_path / name, "stage1_vae") for name in ("whole", "run"))
    assert_equal_bits(whole, parts)


def test_augmentation_reaches_the_training(tiny, tmp_path):
    """Images that are the same upside down are trained on as if there were no flip, others are not."""
    one_sided = np.zeros((40, 16, 16), np.uint8)
    one_sided[:, :, :8] = 255
    np.save(tmp_path / "x.npy", one_sided)
    data = {"source": str(tmp_path / "x.npy"), "image_size": 16}
    seen = {}
    for flip in ("none", "vertical", "horizontal"):
        call(
            stage1_vae.train.main,
            "--config",
            tiny(data=data | {"augment": {"flip": flip}}, run_dir=str(tmp_path / flip)),
        )
        seen[flip] = [line["loss/total"] for line in log(tmp_path / flip, "stage1_vae")]
    assert seen["none"] == seen["vertical"] != seen["horizontal"]


def test_held_out_images_stay_as_they_are(tiny):
    from shared import recipe
    from shared.training.processes import make_accelerator
    from stage1_vae.stage import VAEStage

    scores = []
    for changes in ({}, {"flip": "dihedral", "shift": 3}):
        settings = recipe.load(tiny(data__augment=changes))
        accelerator = make_accelerator(settings.stage1)
        stage = VAEStage(settings.stage1, settings.data, settings.seed, accelerator)
        scores.append({name: float(value) for name, value in stage.validate(iter).items()})
    assert scores[0] == scores[1]


def test_a_mirror_image_of_a_training_image_counts_as_a_copy_of_it():
    from shared.measure import features
    from shared.measure.samples import nearest_of

    x = torch.rand(5, 1, 16, 16)
    shrunk = features.shrunk(x)
    for flip, found in (("none", False), ("horizontal", True), ("dihedral", True)):
        data = DataConfig(channels=1, image_size=16, augment=AugmentConfig(flip=flip))
        distance, places = nearest_of(features.shrunk(x.flip(-1)), shrunk, data)
        assert (distance.max() < 1e-3) == found
        assert not found or places.tolist() == list(range(5))
    turned = features.shrunk(x.rot90(1, (-2, -1)))
    assert nearest_of(turned, shrunk, data)[0].max() < 1e-3


def test_a_shifted_training_image_counts_as_a_copy_of_it():
    from shared.measure import features
    from shared.measure.samples import nearest_of

    x = torch.rand(5, 1, 16, 16)
    moved = features.shrunk(shifted(x, torch.tensor([[2, -2]]).expand(5, 2)))
    distances = []
    for shift in (0, 2):
        data = DataConfig(channels=1, image_size=16, augment=AugmentConfig(shift=shift))
        distance, places = nearest_of(moved, features.shrunk(x), data)
        distances.append(distance.max().item())
    assert places.tolist() == list(range(5)) and distances[1] < 0.7 * distances[0]
