"""Test sets under distribution shift: what a camera, a fax or a typist does to a row.

Images are (n, height, width) in [0, 1]. Each shift has two severities; the same seed gives the
same rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

Images = NDArray[np.float32]
SEVERITIES = (1, 2)


def noise(images: Images, severity: int, rng: np.random.Generator) -> Images:
    return images + rng.normal(0, (0.1, 0.25)[severity - 1], images.shape)


def blur(images: Images, severity: int, rng: np.random.Generator) -> Images:
    sigma = (0.03, 0.06)[severity - 1] * images.shape[-1]
    return ndimage.gaussian_filter(images, (0, sigma, sigma))


def contrast(images: Images, severity: int, rng: np.random.Generator) -> Images:
    mean = images.mean(axis=(1, 2), keepdims=True)
    return mean + (0.5, 0.25)[severity - 1] * (images - mean)


def brightness(images: Images, severity: int, rng: np.random.Generator) -> Images:
    return images + (0.2, 0.4)[severity - 1]


def move(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Shift and rotate about the middle."""
    side = images.shape[-1]
    far, angle = (0.06, 0.12)[severity - 1] * side, np.deg2rad((10, 25)[severity - 1])
    middle, moved = np.array([(side - 1) / 2] * 2), np.empty_like(images)
    for i, image in enumerate(images):
        turn = rng.uniform(-angle, angle)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        offset = middle - matrix @ middle + rng.uniform(-far, far, 2)
        ndimage.affine_transform(image, matrix, offset, output=moved[i], order=1)
    return moved


def pixelate(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """The mean of squares."""
    size = max(severity + 1, round((0.08, 0.14)[severity - 1] * images.shape[-1]))
    starts = np.arange(0, images.shape[-1], size)
    sums = np.add.reduceat(np.add.reduceat(images, starts, axis=1), starts, axis=2)
    lengths = np.diff([*starts, images.shape[-1]])
    means = sums / np.outer(lengths, lengths)
    return means.repeat(lengths, axis=1).repeat(lengths, axis=2)


def occlude(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """A grey square somewhere."""
    side = images.shape[-1]
    size = round((0.3, 0.5)[severity - 1] * side)
    covered, at = images.copy(), np.arange(side)
    top, left = rng.integers(0, side - size + 1, (2, len(images), 1))
    inside = [(at >= start) & (at < start + size) for start in (top, left)]
    covered[inside[0][:, :, None] & inside[1][:, None, :]] = 0.5
    return covered


SHIFTS: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "noise": noise, "blur": blur, "contrast": contrast, "brightness": brightness, "move": move,
    "pixelate": pixelate, "occlude": occlude,
}  # fmt: skip


def shifted_sets(
    X: torch.Tensor, y: torch.Tensor, n: int, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``n`` rows for each shift and severity, drawn anew for each from these images."""
    sets = {}
    for i, (name, shift) in enumerate(SHIFTS.items()):
        for severity in SEVERITIES:
            rng = np.random.default_rng([seed, i, severity])
            rows = rng.permutation(len(X))[:n]
            found = shift(X[rows].numpy().astype(np.float32), severity, rng).clip(0, 1)
            sets[f"{name} {severity}"] = torch.from_numpy(found.astype(np.float32)), y[rows]
    return sets


# ------------------------------------------------------------------ texts

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
BESIDE = {
    key: row[max(0, i - 1) : i] + row[i + 1 : i + 2]
    for row in KEYBOARD
    for i, key in enumerate(row)
}
TYPING = (0.05, 0.15)  # of the letters


def mistyped(text: str, severity: int, rng: np.random.Generator) -> str:
    """Drop letters, double them, exchange them with the next or hit the key beside."""
    letters, at = list(text), 0
    while at < len(letters):
        key = letters[at].lower()
        if key in BESIDE and rng.random() < TYPING[severity - 1]:
            what = rng.integers(4)
            if what == 0:
                letters[at] = ""
            elif what == 1:
                letters[at] *= 2
            elif what == 2:
                letters[at] = str(rng.choice(list(BESIDE[key])))
            elif at + 1 < len(letters):
                letters[at : at + 2] = letters[at + 1], letters[at]
                at += 1
        at += 1
    return "".join(letters)
