"""Volumes and stacks of science as an array to train on, and a drawn stack as a volume.

`python -m shared.convert SOURCE --out FILE.npy [--dataset NAME] [--axis axial]` writes the 2-D slices of
HDF5, zarr, NIfTI, DICOM or TIFF, or the images of .npy and .npz files, in the units of these, and FILE.csv: a
row for each slice with its file, place and label. `python -m shared.convert STACK.npy --out FILE.nii.gz
[--like VOLUME.nii]` goes back.
"""

import argparse

from shared import config, disk
from shared.config import InputError
from shared.data.config import NIFTI
from shared.formats.nifti import AXES, to_volume
from shared.formats.stack import to_array


def parse() -> argparse.Namespace:
    parser = config.Parser(
        prog="python -m shared.convert", description="Volumes and stacks to arrays, and back."
    )
    parser.add_argument(
        "source",
        help="a file or a folder of HDF5, zarr, NIfTI, DICOM, TIFF, .npy, .npz; or an .npy, to go back",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="FILE.npy; to go back FILE.nii or FILE.nii.gz"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="the array's name in HDF5, zarr, .npz (default: the largest)"
    )
    parser.add_argument("--axis", choices=AXES, default="axial", help="of volumes: how they are sliced")
    parser.add_argument(
        "--like", metavar="VOLUME", help="to go back: a volume that lies in space as this one shall"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    source, out = disk.path_of(options.source), disk.path_of(options.out)
    if out.suffix == ".npy":
        shape = to_array(source, out, options.dataset, options.axis)
        sides = "x".join(map(str, shape[1:]))
        config.say(f"{out}: {shape[0]:,} slices of {sides}; {out.with_suffix('.csv')}: a row for each")
    elif out.name.endswith(NIFTI):
        like = disk.path_of(options.like) if options.like else None
        shape = to_volume(source, out, options.axis, like)
        config.say(f"{out}: a volume of {'x'.join(map(str, shape))}")
    else:
        raise InputError(f"--out: {out} is neither FILE.npy nor, to go back, FILE.nii or FILE.nii.gz")


if __name__ == "__main__":
    config.run(main)
