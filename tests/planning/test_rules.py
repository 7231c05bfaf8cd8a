"""Which recipe follows from which facts: numbers in, keys with reasons out. Nothing is trained here."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from shared import recipe
from shared.config import InputError
from shared.data.config import DataConfig
from shared.data.images import resize_values
from shared.planning import budget, expectation, rules, sizes, write
from shared.planning.facts import Images, Machine, Pace, Values, family
from shared.planning.rules import Choices

PHOTOS = Images(
    source="digits", count=3781, height=128, width=128, alike=1.0, uniform=True, channels=3, integer=True,
    looked=1000, label_column="label", classes={"cat": 3000, "dog": 781},
)  # fmt: skip
DENSE = Values(low=-3.0, high=3.0, zeros=0.0, tail=1e9, reach=1.5, knee=2.0, knees=(2.0,))
INTENSITY = Values(low=0.0, high=9.0, zeros=0.0, tail=7.0, reach=3.0, knee=3.0, knees=(3.0,))
SPARSE = Values(low=0.0, high=482.0, zeros=0.96, tail=190.0, reach=53.0, knee=9.08, knees=(9.08,))
FIELDS = replace(
    PHOTOS, is_array=True, integer=False, values=DENSE, height=40, width=80, classes=None, label_column=None
)
MACHINE = Machine(name="two cores", disk=1 << 36, perceptual=False)
PACE = Pace(
    command=3.0, step1=0.1, step1_adversarial=0.15, check1=1.5, read=5e-4, decode=0.0, encode=1e-3,
    step2=0.25, check2=2.0, draw=0.02, disk=1 << 28, latents=1 << 12,
)  # fmt: skip


def planned(images, minutes=10.0, pace=PACE, given=None, machine=MACHINE):
    """The choices and the budget of the largest size."""
    given = {"name": "x"} | (given or {})
    size = sizes.sizes(images, given, True)[0]
    choices = Choices(given)
    choices.take("name", given["name"], "")
    rules.data_rules(choices, images, size)
    rules.network_rules(choices, images, size, machine)
    return choices, budget.divide(choices, images, pace, minutes, 10.0)


def loaded(choices, tmp_path):
    """The recipe, read as every recipe is; its source is not looked at."""
    path = tmp_path / "plan.yaml"
    path.write_text(write.text(choices.finish(), "python -m shared.plan", ["a note"]))
    return recipe.load(path, needs_images=False)


KINDS = {
    "photos": PHOTOS,
    "icons": replace(PHOTOS, channels=4, height=64, width=64),
    "digits": replace(PHOTOS, channels=1, height=28, width=28, framed=True),
    "landscapes": replace(PHOTOS, height=400, width=600),
    "portraits": replace(PHOTOS, height=600, width=400),
    "strips": replace(PHOTOS, height=40, width=2000),
    "sizes of all kinds": replace(PHOTOS, height=333, width=517, alike=0.2, uniform=False),
    "fields": FIELDS,
    "seven channels": replace(FIELDS, channels=7),
    "grey levels of seven channels": replace(PHOTOS, is_array=True, channels=7, height=64, width=64),
    "odd sides": replace(FIELDS, height=50, width=50),
    "few large fields": replace(FIELDS, count=20, height=256, width=256, values=INTENSITY),
    "jets": replace(FIELDS, height=64, width=64, channels=3, values=SPARSE),
    "tiny set": replace(PHOTOS, count=16, classes={"a": 14, "b": 2}),
}


@pytest.mark.parametrize("stage2", [True, False])
@pytest.mark.parametrize(("kind", "perceptual"), list(itertools.product(KINDS, [True, False])))
def test_every_kind_of_images_gets_a_recipe_that_loads(kind, perceptual, stage2, tmp_path):
    given = {} if stage2 else {"stage2": None}
    for size in sizes.sizes(KINDS[kind], given, True):
        choices, found = planned(
            KINDS[kind],
            given=given | {"data.image_size": size},
            machine=replace(MACHINE, perceptual=perceptual),
        )
        made = loaded(choices, tmp_path)
        assert made.stage1.max_steps == found.stage1.steps >= rules.LEAST_STEPS
        assert (made.stage2 is not None) == stage2
        looked_at = perceptual and made.data.channels in (3, 4) and family(KINDS[kind]) == "picture"
        assert bool(made.stage1.loss_weights.lpips) == (looked_at and min(made.data.size) >= 96)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("minutes", [3, 5, 15, 60, 600])
def test_the_minutes_are_used_and_not_more(kind, minutes):
    choices, found = planned(KINDS[kind], minutes)
    assert found.total / 60 <= minutes + 1 / 60
    _, reason = choices.lines["stage2.max_steps"]
    assert found.total / 60 >= 0.95 * minutes or reason == budget.BY_HEART


def test_pictures_with_an_empty_border_are_padded(tmp_path):
    made = loaded(planned(KINDS["digits"])[0], tmp_path)
    assert (made.data.resize, made.data.image_size) == ("pad", 32)
    made = loaded(planned(replace(KINDS["digits"], framed=False))[0], tmp_path)
    assert made.data.resize == "crop"


def test_sparse_arrays_of_other_sizes_are_padded_or_their_knee_is_that_of_means(tmp_path):
    detector = replace(KINDS["jets"], source="jets.npy", height=125, width=125)
    small = loaded(planned(detector, given={"data.image_size": 64})[0], tmp_path).data
    assert (small.resize, small.value_transform.scale) == ("pad", 2.3)  # 2x2 cells become one
    large = loaded(planned(detector)[0], tmp_path).data
    assert (large.resize, large.image_size, large.value_transform.scale) == ("pad", 128, 9.1)
    few = replace(detector, count=20)  # cut into patches as they are
    assert loaded(planned(few)[0], tmp_path).data.value_transform.scale == 9.1
    strips = replace(detector, height=40, width=2000)  # the middle is kept: 40 cells become 32
    given = {"data.image_size": [32, 128]}
    assert loaded(planned(strips, given=given)[0], tmp_path).data.value_transform.scale == 5.8


@pytest.mark.parametrize(
    ("height", "width", "found"),
    [
        (24, 12, [[24, 16]]),
        (51, 44, [[56, 48]]),
        (33, 33, [[40, 40]]),
        (64, 64, [[64, 64]]),
        (125, 125, [[128, 128], [64, 64], [32, 32]]),
        (100, 200, [[56, 104], [40, 72], [24, 40]]),
    ],
)
def test_nothing_of_a_sparse_array_is_cut_or_enlarged(height, width, found):
    """Each size holds the array, or whole blocks of its cells."""
    detector = replace(KINDS["jets"], source="jets.npy", height=height, width=width)
    assert sizes.sizes(detector, {}, True) == found
    hits = np.random.default_rng(0).random((1, height, width)).astype(np.float32)
    for size in found:
        data = DataConfig(source="x", image_size=size, channels=1, resize="pad")
        cells = hits.mean() * hits.size * sizes.share_of_area(detector, size, "pad")
        assert resize_values(hits, data).sum() == pytest.approx(cells, rel=1e-4)
    if (height, width) == (51, 44):  # as asked, rounded like any field
        assert sizes.sizes(detector, {"data.resize": "crop"}, True) == [[48, 48]]


def test_pictures_that_were_made_floats_are_planned_as_pictures(tmp_path):
    floats = replace(PHOTOS, integer=False, is_array=True, values=replace(DENSE, levels=(0, 1)))
    for given in ({}, {"data.value_transform.high": 2}, {"data.value_transform.kind": "auto"}):
        made = loaded(planned(floats, given=given)[0], tmp_path)
        transform = made.data.value_transform
        if transform.kind == "range":
            assert (transform.low, transform.high) == (0, 2 if given else 1)
        else:
            assert transform.low is None and given
        assert made.stage1.loss_weights.adversarial and made.stage2.guide_at and not made.data.field


def test_few_pictures_are_shifted_and_not_seen_until_they_are_known_by_heart(tmp_path):
    few = replace(PHOTOS, count=300, classes=None, label_column=None, mirrored=True)
    choices, found = planned(few, 15, given={"data.image_size": 64})
    augment = loaded(choices, tmp_path).data.augment
    assert augment.shift == 6 and augment.copies == budget.MOST_COPIES
    assert found.stage2.seen <= budget.LOOKS_FEW * 300 * augment.copies and found.total > 14 * 60
    choices, found = planned(few, 15, given={"data.augment.copies": 2})
    assert "data.augment.shift" not in choices.lines
    assert found.stage2.seen == pytest.approx(budget.LOOKS_FEW * 600, rel=0.01) and found.total < 12 * 60
    own = {"data.augment.copies": 16, "data.augment.shift": 6}
    assert planned(replace(few, mirrored=False), 15, given=own)[1].total > 14 * 60
    long = planned(few, None, given={"data.image_size": 64, "stage2.max_steps": 700})[0]
    assert long.lines["data.augment.copies"][0] == 2 * math.ceil(700 * 128 / (20 * 600))
    slow = replace(PACE, encode=0.1)  # large photos: a tenth of the time is not more than 800 of them
    assert planned(few, 15, slow)[0].lines["data.augment.copies"][0] == 2


def test_who_has_many_pictures_or_none_gets_no_shifted_copies():
    choices, found = planned(replace(PHOTOS, mirrored=True), 15)
    assert "data.augment.shift" not in choices.lines and found.total > 14 * 60
    choices, found = planned(replace(FIELDS, count=500), 15)  # what may be shifted of a field nobody knows
    assert "data.augment.shift" not in choices.lines
    assert found.stage2.seen == pytest.approx(budget.LOOKS_FEW * 500, rel=0.01) and found.total < 14 * 60
    choices, found = planned(replace(PHOTOS, count=1906), 60)
    assert "data.augment.shift" not in choices.lines
    assert found.stage2.seen == pytest.approx(budget.LOOKS * 1906, rel=0.01) and found.total < 50 * 60
    fast = replace(PACE, step1=0.01, step1_adversarial=0.01, step2=0.02)  # a GPU meets it of thousands
    choices, found = planned(replace(PHOTOS, count=3592), 30, fast)
    assert "data.augment.shift" not in choices.lines
    assert found.stage2.seen == pytest.approx(budget.LOOKS * 3592, rel=0.01) and found.total < 25 * 60
    patches = replace(PHOTOS, is_array=True, count=20, height=256, width=256, channels=1)
    choices, found = planned(patches, 120)
    most = budget.LOOKS_SHIFTED * found.images * choices.copies
    assert found.stage2.seen == pytest.approx(most, rel=0.01)
    assert "data.augment.shift" not in planned(patches, 15)[0].lines
    only_vae = planned(replace(PHOTOS, count=300), 15, given={"stage2": None})[0]
    assert "data.augment.shift" not in only_vae.lines


def test_too_few_for_anything_are_still_trained_on_long_enough_to_show_a_shape():
    _, found = planned(KINDS["tiny set"], 60, given={"data.augment.copies": 1})
    assert found.stage2.seen == pytest.approx(budget.FEWEST_SEEN, rel=0.01)


def test_stage_2_planned_anew_keeps_to_what_it_may_see():
    pace = {"command": 3.0, "step2": 0.25, "check2": 2.0, "draw": 0.02}
    steps = [budget.settle(pace, 128, 64, most, 600.0).lines["stage2.max_steps"][0] for most in (1e9, 64_000)]
    assert steps[0] > 1500 and steps[1] == 500


def test_a_set_too_large_to_be_encoded_is_cut():
    choices, found = planned(replace(PHOTOS, count=10**7), 10)
    assert found.encoding < 0.11 * 600
    limit = choices.lines["data.limit"][0]
    assert limit == found.images == pytest.approx(0.1 * 550 / PACE.encode, rel=0.1)
    assert limit * choices.lines["data.val_fraction"][0] == pytest.approx(rules.MOST_HELD_OUT, rel=0.05)


def test_too_few_minutes_are_one_line_that_says_how_many_do():
    with pytest.raises(InputError, match="--minutes: 0.5 are too few: .* give it 4") as told:
        planned(PHOTOS, 0.5)
    assert "\n" not in str(told.value)
    planned(PHOTOS, 3)


def test_without_minutes_as_many_images_are_seen_as_good_results_took():
    choices, found = planned(replace(PHOTOS, height=64, width=64), None)
    assert found.stage1.seen == pytest.approx(rules.GOOD[64][0], rel=0.01)
    assert choices.lines["stage2.max_steps"][0] == rules.GOOD[64][1] // 128


def test_what_the_user_said_stays_and_what_hangs_on_it_follows(tmp_path):
    given = {"data.image_size": 32, "stage2.batch_size": 64, "seed": 7, "stage1.max_steps": 70}
    choices, found = planned(PHOTOS, given=given)
    made = loaded(choices, tmp_path)
    assert made.data.size == (32, 32) and made.stage1.model.latent_shape == [4, 8, 8]
    assert (made.stage2.batch_size, made.seed, made.stage1.max_steps) == (64, 7, 70)
    assert found.stage1.steps == 70
    assert choices.finish()["seed"] == (7, "as you said")


@pytest.mark.parametrize(
    ("kind", "key", "value", "follows"),
    [
        ("few large fields", "data.resize", "crop", lambda m: m.data.size == (128, 128)),
        ("photos", "stage1.model.posterior", "deterministic", lambda m: not m.stage1.loss_weights.kl),
        ("jets", "stage1.model.output_activation", "relu", lambda m: m.stage1.loss_weights.mse),
        ("icons", "stage1.model.channels", [32, 64, 64, 96], lambda m: 4 in m.stage1.model.latent_shape[1:]),
        ("photos", "stage2.optim.name", "adamw", lambda m: m.stage2.optim.lr != 6e-3),
    ],
)  # fmt: skip
def test_what_hangs_on_a_given_choice_follows(kind, key, value, follows, tmp_path):
    assert follows(loaded(planned(KINDS[kind], given={key: value})[0], tmp_path))


def test_a_dark_set_has_its_own_range(tmp_path):
    made = loaded(planned(replace(PHOTOS, brightest=1))[0], tmp_path)
    assert made.data.value_transform.kind == "minmax"
    assert loaded(planned(PHOTOS)[0], tmp_path).data.value_transform.kind == "auto"


def test_a_large_size_is_left_where_too_little_would_be_seen():
    slow = replace(PACE, step1=2.0, step1_adversarial=3.0, step2=4.0)
    choices, found = planned(PHOTOS, 10, slow, {"data.image_size": 64})
    assert not budget.enough(choices, found)
    choices, found = planned(PHOTOS, 10, PACE, {"data.image_size": 64})
    assert budget.enough(choices, found)


def test_rectangles_follow_the_images_and_strips_are_cut_at_four_to_one():
    assert [96, 176] not in sizes.sizes(KINDS["sizes of all kinds"], {}, True)
    assert sizes.sizes(KINDS["sizes of all kinds"], {}, True)[0] == [128, 128]
    for kind in ("landscapes", "portraits", "strips"):
        for height, width in sizes.sizes(KINDS[kind], {}, True):
            wanted = min(4.0, KINDS[kind].width / KINDS[kind].height)
            assert width / height == pytest.approx(wanted, rel=0.15)
    camera = replace(KINDS["landscapes"], height=3024, width=4032)
    assert sizes.sizes(camera, {}, True) == [[112, 144], [48, 64], [24, 32]]
    assert sizes.sizes(FIELDS, {}, True) == [[40, 80]]  # an array keeps its pixels where it can


def test_values_choose_their_transform(tmp_path):
    found = {
        name: loaded(planned(KINDS[name])[0], tmp_path).data.value_transform
        for name in ("jets", "few large fields", "fields", "photos")
    }
    kinds = {name: transform.kind for name, transform in found.items()}
    assert kinds == {"jets": "log1p", "few large fields": "sqrt", "fields": "minmax", "photos": "auto"}
    stars = replace(FIELDS, values=replace(DENSE, low=-9.0, high=1e4, reach=5e3))
    transform = loaded(planned(stars)[0], tmp_path).data.value_transform
    assert (transform.kind, transform.low, transform.scale) == ("asinh", None, 2.0)
    shrunk = loaded(planned(stars, given={"data.image_size": 32})[0], tmp_path).data.value_transform
    assert shrunk.scale == 2.0  # means of what is not empty are as large
    built_in = loaded(planned(KINDS["jets"], given={"data.image_size": 32})[0], tmp_path).data
    assert built_in.value_transform.scale == found["jets"].scale  # made in that size
    assert found["jets"].scale == pytest.approx(SPARSE.knee, rel=0.02) and found["jets"].low == 0
    units = replace(KINDS["jets"], channels=2, values=replace(SPARSE, knees=(9.08, 9e4)))
    made = loaded(planned(units)[0], tmp_path).data
    assert made.value_transform.scale == [9.1, 9e4]
    of_their_own = loaded(planned(units, given={"data.value_transform.kind": "auto"})[0], tmp_path).data
    assert of_their_own.value_transform.low is None


@pytest.mark.parametrize(("own", "other"), [("stage1", "stage2"), ("stage2", "stage1")])
def test_the_rest_is_planned_around_steps_that_were_given(own, other):
    choices, found = planned(PHOTOS, 10.0, given={f"{own}.max_steps": 200})
    _, usual = planned(PHOTOS, 10.0)
    assert choices.lines[f"{own}.max_steps"][0] == 200 and 560 < found.total < 610
    assert getattr(found, other).steps > getattr(usual, other).steps
    with pytest.raises(InputError, match=r"and the steps that you gave take \d+\.\d of them"):
        planned(PHOTOS, 10.0, given={f"{own}.max_steps": 20_000})


def test_values_are_read_once_and_by_stage_1_alone():
    """For their bounds, and whether they are numbers."""
    slow, unread = (replace(PACE, read=seconds, encode=0.05) for seconds in (0.05, 0.0))
    high = {"data.value_transform.high": 1.0}
    both = high | {"data.value_transform.low": 0.0}
    known, half, open_ = (planned(FIELDS, 30, pace=slow, given=given)[1] for given in (both, high, {}))
    assert known.reading == half.reading == open_.reading
    _, free = planned(FIELDS, 30, pace=unread)
    assert free.reading == 0 and open_.reading == pytest.approx(0.05 * open_.images, rel=0.01)
    given = {"data.value_transform.kind": "minmax"}  # of pictures, where no rule says so
    (_, grey), (_, usual) = (planned(PHOTOS, 30, pace=slow, given=one) for one in (given, {}))
    assert usual.reading == 0 and grey.reading == pytest.approx(0.05 * grey.images, rel=0.01)
    few = replace(FIELDS, count=20, height=256, width=256)
    (_, patches), (_, free) = (planned(few, 30, pace=replace(PACE, read=read)) for read in (PACE.read, 0.0))
    assert free.reading == 0 and patches.reading == pytest.approx(PACE.read * patches.images, rel=0.01)
    assert patches.images > 20 * 100


def test_what_is_mostly_empty_has_a_hurdle_if_its_network_is_new(tmp_path):
    made = loaded(planned(KINDS["jets"])[0], tmp_path)
    assert made.stage1.model.output_activation == "hurdle" and made.stage1.loss_weights.hurdle == 1
    made = loaded(planned(KINDS["jets"], given={"stage1.model.pretrained": "folder"})[0], tmp_path)
    assert made.stage1.model.output_activation != "hurdle" and made.stage1.loss_weights.mse == 1


def test_fields_are_neither_mirrored_nor_guided(tmp_path):
    made = loaded(planned(replace(FIELDS, mirrored=True))[0], tmp_path)
    assert made.data.augment.flip == "none"
    assert made.sampling.guidance_scale == 1 and made.stage2.guide_at is None
    made = loaded(planned(replace(PHOTOS, mirrored=True))[0], tmp_path)
    assert made.data.augment.flip == "horizontal" and made.data.augment.copies == 2
    given = {"data.augment.flip": "none"}
    made = loaded(planned(replace(PHOTOS, mirrored=True), given=given)[0], tmp_path)
    assert made.data.augment.copies == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"count": 5}, "holds 5 images; fewer than 16"),
        ({"height": 1, "width": 1}, "images of 1x1 px; at least 8"),
        ({"unreadable": ("torn.png",) * 200}, "200 of 1000 images cannot be read, such as torn.png"),
    ],
)
def test_what_cannot_be_planned_is_one_line(changes, line):
    with pytest.raises(InputError, match=line):
        rules.refuse(replace(PHOTOS, **changes), {})


def test_a_few_large_fields_are_many_patches():
    fields = KINDS["few large fields"]
    rules.refuse(replace(fields, count=3), {})
    assert sizes.pieces(fields, [32, 32], "patches") == 29 * 29  # as PatchSource cuts them
    assert sizes.pieces(PHOTOS, [64, 64], "crop") == 1
    large = replace(fields, count=30, height=1024, width=1024)  # they overlap no longer
    assert sizes.pieces(large, [32, 32], "patches") == 32 * 32
    assert sizes.pieces(replace(large, count=3, there=30), [32, 32], "patches") == 32 * 32  # data.limit


@pytest.mark.parametrize("given", [{}, {"data.resize": "patches"}])
def test_of_too_many_patches_whole_images_are_left_out(given):
    """data.limit counts images, and patches may be asked for where they would not be chosen."""
    fields = replace(FIELDS, count=600 if given else 400, height=2048, width=2048)
    choices, found = planned(fields, minutes=30.0, given=given | {"data.image_size": 32})
    limit = choices.lines["data.limit"][0]
    assert found.encoding == pytest.approx(limit * 64 * 64 * PACE.encode)
    assert found.encoding <= 0.1 * 30 * 60
    choices, _ = planned(replace(fields, height=8192, width=8192), given=given | {"data.image_size": 32})
    assert choices.lines["data.limit"][0] == budget.FEWEST_CUT  # one alone could not be divided


def test_of_a_pretrained_autoencoder_that_stays_stage_1_takes_no_time(tmp_path):
    given = {"stage1.model.pretrained": "folder", "stage1.model.train": "nothing"}
    choices, found = planned(PHOTOS, given=given)
    assert found.stage1.steps == 0 and found.stage2.seconds > 0.9 * (10 * 60 - 60)
    assert loaded(choices, tmp_path).stage1.model.train == "nothing"


def test_unreadable_images_are_allowed_for(tmp_path):
    made = loaded(planned(replace(PHOTOS, unreadable=("a.png",) * 30))[0], tmp_path)
    assert made.data.max_bad_fraction == pytest.approx(0.06)


def test_expectations_grow_with_the_time():
    told = []
    for minutes in (3, 30):
        choices, found = planned(replace(PHOTOS, height=64, width=64), minutes)
        told.append(expectation.expected(choices, PHOTOS, found))
    assert told[0] != told[1] and "gallery" in told[1]
    given = {"stage1.model.pretrained": "folder", "stage1.model.train": "nothing", "data.image_size": 64}
    assert "gallery" in expectation.expected(*expected(planned(PHOTOS, 30, given=given)))
    choices, found = planned(replace(PHOTOS, count=300), 30, given={"data.image_size": 64})
    assert "so few" not in told[1] and "so few" in expectation.expected(choices, PHOTOS, found)
    assert "no stage 2" in expectation.expected(*expected(planned(PHOTOS, 30, given={"stage2": None})))


def expected(pair):
    choices, found = pair
    return choices, PHOTOS, found


def test_reasons_stand_in_the_file():
    choices, _ = planned(PHOTOS)
    content = write.text(choices.finish(), "python -m shared.plan x", ["a note"])
    lines = content.splitlines()
    assert lines[:2] == ["# python -m shared.plan x", "# a note"]
    comments = " ".join(line.partition("# ")[2].strip() for line in lines)
    for _, reason in choices.lines.values():
        assert reason in comments
    assert max(map(len, lines[2:])) <= 112


def test_the_rules_come_without_torch():
    code = "import sys; from shared.planning import rules, budget, write; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_more_is_encoded_than_stage_2_will_see():
    choices, found = planned(replace(PHOTOS, count=200_000), 5, replace(PACE, encode=1e-5))
    limit = choices.lines["data.limit"][0]
    assert choices.lines["data.limit"][1] == "stage 2 will see no more"
    assert limit * choices.copies == pytest.approx(found.stage2.seen, rel=0.1)


def test_large_files_are_decoded_once_which_takes_its_time():
    slow = replace(PACE, decode=0.02)
    few = replace(PHOTOS, count=2000)
    (_, once), (_, never) = planned(few, 10, slow), planned(few, 10)
    assert once.reading == pytest.approx(40) and never.reading == 0
    assert once.total == pytest.approx(never.total, abs=5) and once.encoding == never.encoding
    assert once.stage1.seconds + once.stage2.seconds == pytest.approx(
        never.stage1.seconds + never.stage2.seconds - 40, abs=5
    )
    choices, found = planned(replace(PHOTOS, count=100_000), 30, slow)
    limit = choices.lines["data.limit"][0]
    assert limit * (0.02 + PACE.encode * choices.copies) == pytest.approx(0.1 * 30 * 60, rel=0.1)
    assert found.reading == pytest.approx(0.02 * limit)
    # Without stage 2 no image is read that stage 1 does not see.
    _, found = planned(replace(PHOTOS, count=100_000), 30, slow, {"stage2": None})
    assert found.total <= 1800 and found.reading >= 0.02 * found.stage1.seen


def test_a_small_set_is_taken_whole_however_long_it_takes():
    choices, _ = planned(replace(PHOTOS, count=600), 60, replace(PACE, encode=0.4))
    assert "data.limit" not in choices.lines


def test_long_trainings_of_pictures_get_a_larger_denoiser_and_more_of_the_time_for_it(tmp_path):
    many = replace(PHOTOS, count=6000)
    choices, found = planned(many, 60)
    assert found.stage2.seen > budget.LARGER_FROM
    assert budget.enlarge(choices, many, found)
    slower = budget.divide(choices, many, replace(PACE, step2=0.6), 60, 10.0)
    assert slower.stage1.seconds < found.stage1.seconds and 59 < slower.total / 60 <= 60
    unet = loaded(choices, tmp_path).stage2.unet
    assert (unet.channels, unet.blocks_per_level, unet.attention_levels) == ([128, 256], 2, [1])


def test_where_the_usual_denoiser_must_stop_early_a_larger_one_uses_the_time():
    several = replace(PHOTOS, count=4000)
    choices, found = planned(several, 60)
    assert found.total < 50 * 60 and budget.enlarge(choices, several, found)


@pytest.mark.parametrize(
    ("images", "minutes", "given"),
    [
        (PHOTOS, 10, {}),
        (replace(PHOTOS, count=1906), 60, {}),
        (FIELDS, 60, {}),
        (KINDS["digits"], 60, {}),
        (PHOTOS, 60, {"stage2.unet.channels": [64, 128]}),
        (PHOTOS, 60, {"stage2.max_steps": 10_000}),
        (PHOTOS, 60, {"stage2.init": "runs/other"}),  # whose weights would not fit
        (PHOTOS, 60, {"stage2": None}),
    ],
)
def test_who_has_little_time_or_few_images_or_says_otherwise_gets_the_usual_denoiser(images, minutes, given):
    choices, found = planned(images, minutes, given=given)
    lines = dict(choices.lines)
    assert not budget.enlarge(choices, images, found)
    assert choices.lines == lines


def test_the_guide_of_pictures_with_classes_is_told_none():
    def told(images, **given):
        return "sampling.unconditional_guide" in planned(images, given=given)[0].lines

    assert told(PHOTOS) and not told(PHOTOS, **{"stage2.label_dropout": 0})
    assert not told(replace(PHOTOS, classes=None, label_column=None)) and not told(FIELDS)


def test_steps_of_pictures_are_shifted_where_the_path_is_straight(tmp_path):
    def shift(images, **given):
        return loaded(planned(images, given=given)[0], tmp_path).sampling.shift

    assert shift(PHOTOS) == 2 and shift(FIELDS) == shift(PHOTOS, **{"stage2.objective": "v"}) == 1
