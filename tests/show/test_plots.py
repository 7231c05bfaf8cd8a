"""Figures of many parts stay figures that can be drawn."""

import numpy as np

from shared.show import plots


def test_of_many_channels_the_first_statistics_are_drawn():
    rng = np.random.default_rng(0)
    scalars = {f"channel {number}": (rng.random(4), rng.random(4)) for number in range(400)}
    curves = {f"spectrum {number}": (rng.random((4, 5)), rng.random((4, 5))) for number in range(200)}
    figure = plots.statistics(scalars, curves)
    assert len(figure.axes) == 2 * plots.MOST_PANELS
    assert figure.axes[0].get_title(loc="left") == "channel 0"
