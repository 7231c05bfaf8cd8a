import numpy as np
import pytest
import torch
from PIL import Image

from shared.show import grids


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_a_grid_shows_every_image_in_reading_order(channels):
    levels = torch.linspace(-1, 1, 5)
    x = levels.view(5, 1, 1, 1).expand(5, channels, 64, 64)
    image = np.asarray(grids.grid(x, columns=2))
    tile = 64 * (1 if channels in (1, 3) else channels)
    for i, level in enumerate(levels):
        top, left = i // 2 * 66 + 2, i % 2 * (tile + 2) + 2
        assert (image[top : top + 64, left : left + tile] == round((level.item() + 1) * 127.5)).all()
    assert (image[:2] == 255).all() and (image[-66:, tile + 4 :] == 255).all()


def test_transparency_is_laid_on_white():
    black = torch.full((3, 3, 64, 64), -1.0)
    alpha = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 64, 64)  # clear, half, opaque
    assert grids.to_uint8(torch.cat([black, alpha], 1))[:, 0, 0, 0].tolist() == [255, 128, 0]


def test_four_channels_of_a_field_are_no_colours():
    x = torch.linspace(-1, 1, 4).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    assert grids.pictures(x, grey_levels=True) is x
    row = grids.to_uint8(grids.pictures(x, grey_levels=False))[0]
    assert row.shape == (8, 32, 3) and row[0, ::8, 0].tolist() == [0, 85, 170, 255]
    assert grids.grid(torch.zeros(1, 1, 40, 320)).size == (324, 44)  # wide as it is: not enlarged


def test_pairs_put_inputs_over_reconstructions():
    x, x_hat = torch.full((16, 1, 64, 64), -1.0), torch.full((16, 1, 64, 64), 1.0)
    image = np.asarray(grids.pairs(x, x_hat))
    assert [image[2 + 66 * row, 2, 0] for row in range(4)] == [0, 255, 0, 255]


def test_single_and_gif(tmp_path):
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA"), (6, "L")):
        assert grids.single(torch.zeros(channels, 8, 8)).mode == mode
    frames = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 16, 16)
    grids.save_gif(grids.frames(frames), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 10 and gif.size == (256, 256)  # there and back
    grids.save_gif(grids.frames(frames), tmp_path / "y.gif", back=False)
    with Image.open(tmp_path / "y.gif") as gif:
        assert gif.n_frames == 6  # once, and the last one stays (equal frames are one)
