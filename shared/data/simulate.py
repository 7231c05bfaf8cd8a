"""Two small simulators, laser speckle and particle jets, so that the physics recipes need no download.

Image `index` is a function of (index, size) alone, made when it is asked for. Does not depend on data sets.
"""

import numpy as np


def speckle(index: int, size: int) -> np.ndarray:
    """A fully developed speckle pattern, (1,size,size) float32 intensities of mean 1, contrast about 1.

    I = |IFFT2(P FFT2(exp(i phi)))|^2: a field of random phase phi behind a circular pupil P of diameter D;
    the grain is about size / D pixels wide (Goodman 2007, Speckle Phenomena in Optics; Duncan & Kirkpatrick
    2008, Proc. SPIE 6855). The grain is different from image to image, 4 to 10 pixels: at 64 pixels that
    leaves 500 to 80 independent numbers in a pattern.
    """
    rng = np.random.default_rng([1, index])
    grain = np.exp(rng.uniform(np.log(4.0), np.log(10.0)))
    phase = np.exp(2j * np.pi * rng.random((size, size)))
    frequency = np.fft.fftfreq(size)
    pupil = np.hypot(*np.meshgrid(frequency, frequency)) <= 0.5 / grain
    intensity = np.abs(np.fft.ifft2(pupil * np.fft.fft2(phase))) ** 2
    return (intensity / intensity.mean()).astype(np.float32)[None]


# mean number of particles, radius of half the momentum, for gluon and quark: what tells them apart
# (Gallicchio & Schwartz 2011)
JETS = ((53.0, 0.085), (34.0, 0.055))
HALF_WIDTH = 0.4  # of the image, in rapidity and azimuth
TOWER = 5  # cells of one hadronic calorimeter tower


def jet(index: int, size: int) -> np.ndarray:
    """A jet of 500 to 600 GeV as energies, (3,size,size) float32 in GeV.

    The channels are tracks, electromagnetic and hadronic calorimeter. A parametric sketch, not a physics
    generator: multiplicity and width by class (even index gluon, odd index quark), momenta shared out by a
    Dirichlet law, 60 % charged hadrons, 27 % photons, 13 % neutral hadrons; a hadron fills a tower of 5x5
    cells.
    """
    rng = np.random.default_rng([2, index])
    mean, radius = JETS[index % 2]
    count = max(4, rng.negative_binomial(12, 12 / (12 + mean)))
    momentum = rng.uniform(500, 600) * rng.dirichlet(np.full(count, 0.35))
    # hard particles fly close to the axis, soft ones wide of it
    spread = radius * (momentum.mean() / np.maximum(momentum, 0.2)) ** 0.35 * rng.exponential(1.0, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    places = spread[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    cells = np.floor((places / HALF_WIDTH + 1) * size / 2).astype(int)
    kind = rng.choice(3, count, p=(0.6, 0.27, 0.13))
    image = np.zeros((3, size, size), np.float32)
    for (row, column), energy, what in zip(cells, momentum, kind, strict=True):
        if not (0 <= row < size and 0 <= column < size) or energy < 0.2:
            continue
        if what == 0:
            image[0, row, column] += energy
        if what == 1:  # an electromagnetic shower reaches the neighbouring cells
            image[1, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] += energy * 0.05
            image[1, row, column] += energy * 0.55
        elif energy > 0.7:  # charged and neutral hadrons stop in a tower
            top, left = row // TOWER * TOWER, column // TOWER * TOWER
            tower = image[2, top : top + TOWER, left : left + TOWER]
            tower += 0.8 * energy * rng.normal(1, 0.15) / tower.size
    return np.maximum(image, 0)
