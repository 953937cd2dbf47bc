"""Augmentations: an example and its random numbers to another example of its class."""

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._loader import Augment


def crop_and_flip(padding: int = 4, *, flip: bool = True) -> Augment:
    """Shift an image by up to `padding` pixels each way, and mirror every other one.

    What comes in at the border is 0. The usual augmentation of CIFAR-10 (Lee et al.,
    Deeply-Supervised Nets, 2015, arXiv:1409.5185).

    Args:
        padding: in pixels, 0 or more.
        flip: mirror left and right with probability a half.

    Raises:
        InputError: for a negative padding; when used, for what is no image.
    """
    if padding < 0:
        raise InputError(f"crop_and_flip: padding is {padding}: expected 0 or more pixels")

    def augment(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if image.ndim != 3:
            raise InputError(
                "crop_and_flip takes images [channels, height, width]; got an example of shape"
                f" {list(image.shape)}"
            )
        channels, height, width = image.shape
        down, across = random.integers(0, 2 * padding + 1, 2)
        if flip and random.random() < 0.5:
            image = image[:, :, ::-1]
        # Not numpy.pad, which takes most of the time of a small image's augmentation.
        wide = np.zeros((channels, height + 2 * padding, width + 2 * padding), image.dtype)
        wide[:, padding : padding + height, padding : padding + width] = image
        return wide[:, down : down + height, across : across + width]

    return augment
