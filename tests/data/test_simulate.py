"""The simulators have the statistics that physics gives them."""

import numpy as np
import pytest

from shared.config import InputError
from shared.data import simulate, sources
from shared.data.config import DataConfig, inspect_source


def test_speckle_is_fully_developed():
    fields = np.stack([simulate.speckle(i, 64)[0] for i in range(150)])
    assert fields.mean() == pytest.approx(1, abs=1e-4)
    assert fields.std(axis=(1, 2)).mean() == pytest.approx(1, abs=0.05)  # contrast 1 (Goodman, section 3.2)
    for level in (0.5, 1.0, 2.0):  # P(I > level) = exp(-level)
        assert (fields > level).mean() == pytest.approx(np.exp(-level), abs=0.02)


def test_speckle_has_mixed_grains():
    fields = [simulate.speckle(i, 64)[0] - 1 for i in range(40)]
    neighbours = [
        np.mean(f * np.roll(f, 3, axis=0)) / np.mean(f * f) for f in fields
    ]  # correlation three pixels away
    assert min(neighbours) < 0.35 and max(neighbours) > 0.75


def test_jets():
    jets = np.stack([simulate.jet(i, 64) for i in range(200)])
    assert jets.shape == (200, 3, 64, 64) and jets.dtype == np.float32 and jets.min() >= 0
    assert 0.01 < (jets > 0).mean() < 0.06
    assert 200 < jets[:, 0].sum((1, 2)).mean() < 400
    gluon, quark = ((jets[kind::2, 0] > 0).sum((1, 2)).mean() for kind in (0, 1))
    assert gluon > 1.25 * quark


def test_an_image_is_a_function_of_its_index():
    for make in (simulate.speckle, simulate.jet):
        np.testing.assert_array_equal(make(7, 32), make(7, 32))
        assert not np.array_equal(make(7, 32), make(9, 32))


def test_as_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "SIMULATED", 20)
    jets = sources.open_source(DataConfig(source="jets", image_size=16, channels=3))
    assert len(jets) == 20 and jets.names == ["gluon", "quark"] and jets.labels.tolist() == [0, 1] * 10
    np.testing.assert_array_equal(jets.read([3])[0], simulate.jet(3, 16))
    assert sources.open_source(DataConfig(channels=1, source="speckle", image_size=16)).labels is None
    with pytest.raises(InputError, match="jets have 3, not 1"):
        inspect_source(DataConfig(source="jets", channels=1))
