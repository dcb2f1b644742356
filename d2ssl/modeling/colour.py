"""CIE L*a*b*: how light a pixel is, apart from its colour."""

import numpy as np
import torch

from d2ssl.losses.precision import in_fp32

# Linear sRGB -> XYZ under its white, D65 (IEC 61966-2-1), each row divided by that white's value.
WHITE = np.array([0.95047, 1.0, 1.08883])
RGB_TO_XYZ = (
    np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
              [0.019334, 0.119193, 0.950227]]) / WHITE[:, None]
)  # fmt: skip
# a and b from the cube roots of X, Y, Z, with L = 116 y - 16.
XYZ_TO_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])
KNEE = 6 / 29  # below its cube a straight line takes the cube root's place


@in_fp32
def rgb_to_lab(pixels: torch.Tensor) -> torch.Tensor:
    """N x 3 x H x W sRGB, R first, in 0..255 -> L in 0..100, a in -87..99, b in -108..95; fp32."""
    value = pixels / 255
    linear = torch.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = _mix(RGB_TO_XYZ, linear)
    root = torch.where(xyz > KNEE**3, xyz ** (1 / 3), xyz / (3 * KNEE**2) + 4 / 29)
    lab = _mix(XYZ_TO_LAB, root)
    return torch.cat([lab[:, :1] - 16, lab[:, 1:]], dim=1)


@in_fp32
def lab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """The way back, to 0..255; a colour that sRGB cannot show is clipped to what it can; fp32."""
    root = _mix(np.linalg.inv(XYZ_TO_LAB), torch.cat([lab[:, :1] + 16, lab[:, 1:]], dim=1))
    xyz = torch.where(root > KNEE, root**3, 3 * KNEE**2 * (root - 4 / 29))
    linear = _mix(np.linalg.inv(RGB_TO_XYZ), xyz).clamp(0, 1)
    value = torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, linear * 12.92)
    return 255 * value


def _mix(matrix: np.ndarray, planes: torch.Tensor) -> torch.Tensor:
    """Each pixel's three values times a 3 x 3 matrix."""
    weights = torch.as_tensor(matrix, dtype=planes.dtype, device=planes.device)
    return torch.einsum("ij,njhw->nihw", weights, planes)
