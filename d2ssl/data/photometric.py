"""Changes of colour and sharpness, as Detectron2 augmentations that leave coordinates alone.

Images are HxWx3 uint8 RGB.
Brightness, contrast, saturation, hue, greyscale and solarisation follow torchvision's definitions.
All randomness is drawn from ``np.random``.
"""

from functools import partial

import cv2
import numpy as np
from detectron2.data import transforms as T

GRAY = np.array([[0.2989, 0.587, 0.114]] * 3, dtype=np.float32)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale all values; 0 is black, 1 the image itself."""
    return _scale_shift(image, factor, 0.0)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean grey; 0 is that grey, 1 the image itself."""
    mean = float(np.dot(GRAY[0], cv2.mean(image)[:3]))
    return _scale_shift(image, factor, (1 - factor) * mean)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's greyscale; 0 is that greyscale, 1 the image itself."""
    mix = factor * np.eye(3, dtype=np.float32) + (1 - factor) * GRAY
    return cv2.transform(image, mix)  # OpenCV saturates


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) in all three planes."""
    return saturation(image, 0.0)


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turn the hue in HSV space by ``turn`` full circles, -0.5 to 0.5."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # H: 256 steps a circle
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)  # wraps round
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by ``sigma`` px; the kernel reaches about three sigmas."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def solarize(image: np.ndarray) -> np.ndarray:
    """Invert the values of 128 or more."""
    values = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(values >= 128, 255 - values, values))


def shift_planes(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Add to each colour plane its own offset (of 255)."""
    mix = np.column_stack([np.eye(3), offsets]).astype(np.float32)
    return cv2.transform(image, mix)


def _scale_shift(image: np.ndarray, scale: float, shift: float) -> np.ndarray:
    values = np.arange(256) * scale + shift
    return cv2.LUT(image, values.clip(0, 255).round().astype(np.uint8))


class ColorJitter(T.Augmentation):
    """Brightness, contrast, saturation and hue by random amounts and in random order.

    The first three are factors U(1-x, 1+x), hue a turn U(-x, x), x the strength given here.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        factor = {
            brightness: self.brightness, contrast: self.contrast, saturation: self.saturation
        }  # fmt: skip
        ops = [
            partial(op, factor=np.random.uniform(max(0.0, 1 - x), 1 + x))
            for op, x in factor.items()
        ]
        ops.append(partial(hue, turn=np.random.uniform(-self.hue, self.hue)))
        order = np.random.permutation(len(ops))
        return T.TransformList([T.ColorTransform(ops[i]) for i in order])


class RandomBlur(T.Augmentation):
    """Gaussian blur with sigma U(low, high) px."""

    def __init__(self, low: float = 0.1, high: float = 2.0):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        sigma = np.random.uniform(self.low, self.high)
        return T.ColorTransform(partial(gaussian_blur, sigma=sigma))


class PlaneShift(T.Augmentation):
    """Each colour plane moves by its own offset U(-strength, strength) * 255."""

    def __init__(self, strength: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        offsets = np.random.uniform(-self.strength, self.strength, 3) * 255
        return T.ColorTransform(partial(shift_planes, offsets=offsets))
