"""Objects of one photo pasted into another, with masks that stay exact.

G. Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance
Segmentation", CVPR 2021.
"""

import cv2
import numpy as np

LEAST_VISIBLE = 0.1  # of an object's pixels; one of which less is left counts as hidden
FEATHER = 1.0  # pixels


def paste(
    image: np.ndarray,
    masks: np.ndarray,
    source: np.ndarray,
    pasted: np.ndarray,
    feather: float = FEATHER,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Put objects of ``source`` into ``image``, where they are in ``source``.

    The paper found detectors alike with and without feathered edges. Here they are feathered: an
    edge that jumps from one pixel to the next, as no camera draws it, tells what was pasted, and a
    task that looks for it would learn little else. It costs about a millisecond.

    Args:
        image: HxWx3, uint8; is not written to.
        masks: NxHxW, bool, of the objects in it.
        source: HxWx3, uint8, in the same colour order.
        pasted: MxHxW, bool, of the objects of ``source`` to paste.
        feather: standard deviation of the Gaussian that the edge is blurred with, in pixels; 0: not
            at all. Masks stay as they are: outside of them the blend is mostly ``image``.

    Returns:
        HxWx3, uint8, the picture; (K+M)xHxW, bool, masks of the K objects of ``image`` that are
        left, without what is covered of them, and of the pasted ones; K indices of those left.
    """
    covered = pasted.any(0)
    out = cv2.copyTo(source, covered.view(np.uint8), image.copy())
    if feather:
        share = cv2.GaussianBlur(covered.view(np.uint8) * 255, (0, 0), feather)
        edge = np.nonzero((share > 0) & (share < 255))
        share = share[edge][:, None] / np.float32(255)
        out[edge] = np.rint(share * source[edge] + (1 - share) * image[edge])
    left = masks & ~covered
    visible = [
        np.count_nonzero(a) > LEAST_VISIBLE * np.count_nonzero(b) for a, b in zip(left, masks)
    ]
    kept = np.flatnonzero(visible)
    return out, np.concatenate([left[kept], pasted]), kept
