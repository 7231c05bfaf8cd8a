"""Features and the distances between sets of them: closed forms, and what copies and noise do to them."""

import subprocess
import sys

import pytest
import torch

from shared.config import InputError
from shared.data.config import DataConfig
from shared.measure import features, reconstructions
from shared.recipe import Recipe
from shared.show.grids import on_white
from tests.conftest import ROOT


def gaussians(shift: float, width: float = 1.0, count: int = 20_000):
    torch.manual_seed(int(shift * 10))
    return shift + width * torch.randn(count, 4), None


def test_fid_of_gaussians_is_the_closed_form():
    # |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)): four dimensions a distance 1 apart, deviations 1 and 2
    found = features.fid(gaussians(0.0), gaussians(1.0, 2.0))
    assert found == pytest.approx(4 * 1 + 4 * (1 - 2) ** 2, rel=0.05)


def test_a_set_against_its_twin_and_against_another():
    near, far = (features.distances(gaussians(0.0, count=600), gaussians(s, count=600)) for s in (0.1, 3.0))
    assert near["fid"] < 0.2 < far["fid"] and abs(near["kid"]) < 0.3 < far["kid"]
    assert near["precision"] > 0.8 > far["precision"] and near["recall"] > 0.8 > far["recall"]
    assert "inception_score" not in near and near["kid_deviation"] > 0


def test_precision_is_of_samples_and_recall_of_real_images():
    narrow = features.distances(gaussians(0.0, 0.2, 600), gaussians(0.5, 1.0, 600))
    assert narrow["precision"] > 0.9 and narrow["recall"] < 0.5


def test_inception_score_of_sure_and_of_unsure_classes():
    sure = torch.eye(10).repeat(300, 1)
    scores = [
        features.distances((gaussians(0, count=3000)[0], scale * sure), gaussians(0.1, count=3000))[
            "inception_score"
        ]
        for scale in (50, 0)
    ]
    assert scores == pytest.approx([10, 1], rel=0.05)


def test_own_extractor_is_the_same_every_time_and_learns_the_classes():
    torch.manual_seed(1)
    labels = torch.arange(200) % 2
    x = torch.randn(200, 1, 16, 16) * 0.1
    x[labels == 1, :, :8] += 1
    state = torch.get_rng_state()
    a, b = (features.own(x, labels, "cpu", steps=30) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    (found, logits), (again, _) = a(x), b(x)
    assert torch.equal(found, again) and found.shape == (200, 256) and "2 classes" in a.name
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    plain = features.own(x, None, "cpu")
    assert plain(x)[1] is None and "random convolutions" in plain.name


def test_nearest_finds_the_copy():
    training = torch.rand(50, 3, 40, 40)
    targets = features.shrunk(training)
    distance, places = features.nearest(features.shrunk(training[[7, 3]]), targets)
    assert places.tolist() == [7, 3] and distance.max() < 1e-3
    assert features.nearest(features.shrunk(torch.rand(4, 3, 40, 40)), targets)[0].min() > 0.05


def test_what_is_kept_of_batches_is_what_is_found_of_all():
    x = torch.rand(150, 3, 40, 48) * 2 - 1
    extractor = features.own(x, torch.arange(150) % 3, "cpu", steps=2)
    kept = features.Kept(200)
    for part in x.split(16):
        kept.add(features.look(extractor, part, "cpu", part))
    seen = kept.all()
    found, logits = extractor.all(x, "cpu", "images")
    assert len(seen) == 150 and torch.equal(seen.values, x)
    assert torch.allclose(seen.found[0], found, atol=1e-5) and torch.allclose(
        seen.found[1], logits, atol=1e-5
    )
    assert torch.equal(seen.small, features.shrunk(x))
    assert features.look(extractor, x[:4], "cpu").values is None
    halves = [features.look(extractor, part, "cpu") for part in (x[1::2], x[::2])]
    order = torch.cat([torch.arange(1, 150, 2), torch.arange(0, 150, 2)]).argsort()
    assert torch.equal(features.joined(halves, order).small, seen.small)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is resident from /proc")
def test_what_is_kept_leaves_no_holes():
    """Small tensors kept between large ones that go took twenty times their size."""
    code = (
        "import resource, torch\n"
        "from shared.measure.images import Rows\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20\n"
        "rows = Rows(16 * 400)\n"
        "for _ in range(8): torch.ones(16, 3, 256, 256).mul(2)\n"
        "before = resident()\n"
        "for _ in range(400):\n"
        "    x = torch.ones(16, 3, 256, 256, dtype=torch.uint8).float().mul(2)\n"
        "    rows.add(torch.nn.functional.adaptive_avg_pool2d(x, 32).flatten(1))\n"
        "print(resident() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 250  # 75 of them are kept


def test_transparency_is_laid_on_white():
    """Fully transparent pixels are white whatever colour hides there; opaque ones keep theirs."""
    x = torch.rand(2, 4, 8, 8) * 2 - 1
    clear, opaque = x.clone(), x.clone()
    clear[:, 3], opaque[:, 3] = -1, 1
    assert torch.equal(on_white(clear), torch.ones(2, 3, 8, 8))
    assert torch.equal(on_white(opaque), x[:, :3])
    assert torch.equal(on_white(x[:, :3]), x[:, :3])


def test_what_auto_chooses(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LATENT_STACK_WEIGHTS", str(tmp_path))  # no Inception there

    def seen():
        return torch.rand(20, 3, 16, 16), None

    assert "random" in features.choose("auto", False, 3, seen, "cpu").name
    assert "random" in features.choose("auto", True, 3, seen, "cpu").name
    assert "inception_fid.safetensors" in capsys.readouterr().out
    with pytest.raises(InputError, match="inception_fid.safetensors"):
        features.choose("inception", True, 3, seen, "cpu")
    for photographs, channels in ((True, 2), (False, 4)):  # four fields are no RGBA
        with pytest.raises(InputError, match="1 or 3 channels and RGBA"):
            features.choose("inception", photographs, channels, seen, "cpu")


@pytest.mark.parametrize("grey_levels", [False, True])
def test_four_fields_are_no_rgba_for_lpips(grey_levels, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LATENT_STACK_WEIGHTS", str(tmp_path))  # none there: asked for, they are missed
    recipe = Recipe(name="x", data=DataConfig(channels=4, image_size=64))
    assert reconstructions.perceptual(recipe, grey_levels, torch.device("cpu")) is None
    assert ("no LPIPS" in capsys.readouterr().out) == grey_levels


@pytest.mark.data
@pytest.mark.slow
def test_the_real_inception_knows_garments_from_digits(weights, data_sets, monkeypatch):
    from shared.data import sources
    from shared.data.config import DataConfig

    monkeypatch.setenv("LATENT_STACK_WEIGHTS", str(weights))
    extractor = features.inception("cpu")

    def some(name, start):
        source = sources.open_source(DataConfig(source=str(data_sets / name), image_size=28, channels=1))
        return (
            torch.stack([torch.from_numpy(p) for p in source.read(list(range(start, start + 64)))]).float()
            / 127.5
            - 1
        )

    garments, others, digits = (
        extractor(some(name, at)) for name, at in (("fashion_mnist", 0), ("fashion_mnist", 64), ("mnist", 0))
    )
    assert garments[0].shape == (64, 2048) and garments[1] is None  # no fc layer in the local file: no logits
    assert features.distances(digits, garments)["kid"] > 5 * abs(features.distances(others, garments)["kid"])


def test_inception_is_filled_from_the_file(monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    given = {}
    monkeypatch.setattr(
        library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state, **_: given.update(state)
    )
    features.Inception({"Conv2d_1a_3x3.conv.weight": torch.ones(1).half()})
    assert (
        given["fc.weight"].shape == (1008, 2048) and given["Conv2d_1a_3x3.conv.weight"].dtype == torch.float32
    )
