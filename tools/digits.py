"""Handwritten digits as a small vision task: scikit-learn's 1,797 scans of 8×8 pixels, enlarged, placed at random, with noise.

The scans are those of `sklearn.datasets.load_digits` (from the UCI repository's "Optical Recognition of Handwritten Digits", under
CC BY 4.0). They are taken out of scikit-learn's wheel; nothing of it is installed or run.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from wheel import Wheel, download, unpack

WHEEL = Wheel(
    "scikit-learn==1.7.2",
    "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
    ("--platform", "manylinux2014_x86_64", "--python-version", "3.11"),
)
MEMBER = "sklearn/datasets/data/digits.csv.gz"
#: Side of an image; scans are enlarged to SCAN and lie somewhere in it.
SIDE, SCAN = 28, 24
HELD_OUT = 540
#: Standard deviation of the noise, where ink is 1 and paper 0.
NOISE = 0.15


@dataclass(frozen=True, slots=True)
class Labelled:
    """Pixels in 0…1 `(N, 1, H, W)` float32 (noise may leave that range) and classes `(N,)` int64."""

    pixels: Tensor
    labels: Tensor


def read_scans() -> Labelled:
    """The 1,797 scans `(1797, 1, 8, 8)`, in an order drawn once. Exits with a message when the wheel cannot be had."""
    with TemporaryDirectory(prefix="digits-") as folder:
        file = unpack(download(WHEEL, Path(folder)), MEMBER, Path(folder))
        with gzip.open(file, "rt") as opened:
            rows = torch.from_numpy(np.loadtxt(opened, delimiter=",", dtype=np.float32))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return Labelled(rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64].long())


def split(scans: Labelled) -> tuple[Labelled, Labelled]:
    """Scans to train on, and `HELD_OUT` others."""
    pixels, labels = scans.pixels, scans.labels
    return Labelled(pixels[HELD_OUT:], labels[HELD_OUT:]), Labelled(pixels[:HELD_OUT], labels[:HELD_OUT])


def place(scans: Labelled, generator: torch.Generator) -> Labelled:
    """Each scan once `(N, 1, 28, 28)`: enlarged, at a random place, with noise."""
    large = functional.interpolate(scans.pixels, size=SCAN, mode="bilinear", align_corners=False)
    corners = torch.randint(SIDE - SCAN + 1, (len(large), 2), generator=generator)
    pixels = NOISE * torch.randn(len(large), 1, SIDE, SIDE, generator=generator)
    for image, scan, (top, left) in zip(pixels, large, corners.tolist(), strict=True):
        image[:, top : top + SCAN, left : left + SCAN] += scan
    return Labelled(pixels, scans.labels)


def placed(scans: Labelled, times: int, seed: int) -> Labelled:
    """Each scan `times` times, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [place(scans, generator) for _ in range(times)]
    return Labelled(torch.cat([r.pixels for r in rounds]), torch.cat([r.labels for r in rounds]))
