"""Handwritten digits from scikit-learn; every fourth image is held out from training.

Source: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from .resize import resize

PATCH = 16  # pixels along the side of a digit and of a patch of the needle model
_MARGIN = 2  # pixels by which a digit may be off centre


@lru_cache
def digit_images(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits at patch size.

    Args:
        held_out: whether to return the quarter that training never sees, or the rest.

    Returns:
        images [N, PATCH, PATCH] float32 in [0, 1], labels [N] int64.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the needle task needs the handwritten digits of scikit-learn: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    images = resize(small, (PATCH, PATCH), "bilinear")[:, 0].numpy()
    chosen = (np.arange(len(labels)) % 4 == 0) == held_out
    return images[chosen], labels[chosen]


def write_digit(digit: int, held_out: bool, rng: np.random.Generator) -> np.ndarray:
    """A random image of this digit, often slightly off centre: [PATCH, PATCH] float32 in [0, 1]."""
    images, labels = digit_images(held_out)
    image = images[rng.choice(np.flatnonzero(labels == digit))]
    if rng.random() < 0.5:
        return image
    top, left = rng.integers(0, 2 * _MARGIN + 1, 2)
    return np.pad(image, _MARGIN)[top : top + PATCH, left : left + PATCH]
