"""
The embedded data set: drawn balloon scenes, annotated as a person would annotate the photos.

It stands in for the Balloon set where that cannot be downloaded, in tests and in first trials.
Scenes have balloons of many sizes and colours (also those of their surroundings) that overlap
each other, hang on strings, stand behind posts, leaves and people, beside round things that are
no balloons. One seed always draws the same pictures.
"""

import json
import os
from collections.abc import Callable

import cv2
import numpy as np
from tqdm import tqdm

from d2ssl.atomic import atomic_folder
from d2ssl.data.datasets.outlines import crosses_itself
from d2ssl.errors import D2SSLError

_VERSION = 1  # raise it when the drawing changes, so that older folders are written anew
_STAMP = "made_by.json"
_ZOOM = 2  # scenes are drawn larger and then scaled down, which smooths all edges
_LEAST_VISIBLE = 0.25  # part of a balloon that must stay visible, or it is not drawn
_LEAST_PIXELS = 30


def write_balloons(
    root: str,
    num_train: int = 61,
    num_val: int = 13,
    size: tuple[int, int] = (240, 320),
    seed: int = 0,
) -> None:
    """
    Write ``root/{train,val}`` in the layout of the Balloon set: JPEG photos and VIA 1.x JSON.

    A folder that was written with the same arguments is left as it is; one written with others
    is replaced. It is complete or absent, never half-written.

    Args:
        root: folder to write.
        num_train, num_val: number of photos, at least 1 each.
        size: height and width of a landscape photo, in pixels; a third stands upright.
        seed: decides all that is drawn.

    Raises:
        D2SSLError: the folder holds something else or cannot be written, or an argument is out of
            range.
    """
    if min(num_train, num_val) < 1:
        raise D2SSLError(f"{num_train} train and {num_val} val photos: give at least 1 each")
    if min(size) < 64:
        raise D2SSLError(f"photos of {size[0]}x{size[1]} pixels: give at least 64 a side")
    if not 0 <= seed < 2**32:
        raise D2SSLError(f"seed {seed}: give one in 0..{2**32 - 1}")
    stamp = {
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "size": list(size),
        "seed": seed,
    }
    if os.path.isdir(root) and os.listdir(root) and _read_stamp(root) == stamp:
        return
    with atomic_folder(root) as folder, tqdm(total=num_train + num_val, unit="photo") as bar:
        for split, (name, count) in enumerate((("train", num_train), ("val", num_val))):
            os.mkdir(os.path.join(folder, name))
            entries = {}
            for i in range(count):
                generator = np.random.RandomState([seed, split, i])
                upright = i % 3 == 2
                image, masks = draw_scene(generator, size[::-1] if upright else size)
                file = f"{name}_{i:03d}.jpg"
                entries.update(_write_photo(os.path.join(folder, name), file, image, masks))
                bar.update()
            with open(os.path.join(folder, name, "via_region_data.json"), "w") as f:
                json.dump(entries, f)
        with open(os.path.join(folder, _STAMP), "w") as f:
            json.dump(stamp, f)


def _read_stamp(root: str) -> dict:
    try:
        with open(os.path.join(root, _STAMP)) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise D2SSLError(
            f"{root}: was not written by this program; choose another folder or move it away"
        ) from error


def _write_photo(folder: str, file: str, image: np.ndarray, masks: list[np.ndarray]) -> dict:
    """Write one JPEG; returns its entry in VIA's JSON."""
    jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    with open(os.path.join(folder, file), "wb") as f:
        f.write(jpeg)
    regions = {}
    for number, mask in enumerate(masks):
        x, y = trace(mask).T.tolist()
        shape = {"name": "polygon", "all_points_x": x, "all_points_y": y}
        regions[str(number)] = {"shape_attributes": shape, "region_attributes": {}}
    return {
        f"{file}{len(jpeg)}": {
            "fileref": "",
            "size": len(jpeg),
            "filename": file,
            "base64_img_data": "",
            "file_attributes": {},
            "regions": regions,
        }
    }


def trace(mask: np.ndarray) -> np.ndarray:
    """
    The outline that a person would click around the largest part of a mask.

    Args:
        mask: bool, drawn ``_ZOOM`` times as large as the photo.

    Returns:
        Nx2 int, each row x, y in pixels of the photo, some 10 to 40 points.
    """
    contour = _outer_contour(mask)
    length = cv2.arcLength(contour, True)
    tolerance = 0.5
    points = contour
    while tolerance == 0.5 or len(points) > 40:
        points = cv2.approxPolyDP(contour, max(tolerance, 0.002 * length), True)
        tolerance *= 1.3
    # From the centre of a drawn pixel to the photo's pixel that a click there would give.
    height, width = mask.shape[0] // _ZOOM, mask.shape[1] // _ZOOM
    points = np.rint((points[:, 0] + 0.5) / _ZOOM - 0.5).astype(int)
    points = points.clip(0, (width - 1, height - 1))
    # A thin neck of the mask can make the rounded outline cross itself; nobody clicks that.
    return cv2.convexHull(points)[:, 0] if crosses_itself(points) else points


def draw_scene(
    generator: np.random.RandomState, size: tuple[int, int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """
    Draw one scene.

    Returns:
        image: HxWx3, uint8, RGB.
        masks: what is seen of each balloon, bool, ``_ZOOM`` times as high and as wide as the
            image. Thin things in front (strings, posts) count as seen through.
    """
    canvas = _draw_background(generator, (size[0] * _ZOOM, size[1] * _ZOOM))
    for _ in range(generator.randint(0, 4)):
        _draw_distractor(generator, canvas)
    masks = []
    wanted = 1 + int(7.99 * generator.rand() ** 1.5)  # 1 to 8, rather few
    for _ in range(wanted * 3):
        if len(masks) < wanted:
            masks = _add_balloon(generator, canvas, masks)
    for _ in range(generator.randint(0, 3)):
        masks = _add_occluder(generator, canvas, masks)
    image = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)
    return _photograph(generator, image), masks


# ---------------------------------------------------------------------------- surroundings


def _noise(generator: np.random.RandomState, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise, HxW, float32 in [-1, 1], with blobs of ``cell`` pixels."""
    grid = [max(2, int(np.ceil(side / cell)) + 1) for side in shape]
    coarse = generator.uniform(-1, 1, grid).astype(np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(-1, 1)


def _cloudy(generator: np.random.RandomState, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Noise of several scales, HxW, float32, about [-1, 1]."""
    octaves = [_noise(generator, shape, cell / 2**k) / 1.7**k for k in range(4)]
    return sum(octaves) / 1.6


def _between(low: tuple, high: tuple, part: np.ndarray) -> np.ndarray:
    """Colours between two, HxWx3, float32."""
    low, high = np.float32(low), np.float32(high)
    return low + (high - low) * part[..., None].clip(0, 1)


def _sky(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    height = np.linspace(0, 1, shape[0], dtype=np.float32)[:, None].repeat(shape[1], 1)
    day, dusk = ((70, 125, 205), (190, 215, 240)), ((120, 90, 140), (250, 180, 120))
    sky = _between(*(day if generator.rand() < 0.7 else dusk), height)
    clouds = _cloudy(generator, shape, shape[1] / 3) * 1.6 - generator.uniform(0, 0.8)
    return sky + (245 - sky) * clouds[..., None].clip(0, 0.9)


def _grass(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    tone = 0.5 + 0.3 * _cloudy(generator, shape, shape[1] / 4)
    blades = generator.uniform(-1, 1, (max(2, shape[0] // 5), max(2, shape[1] // 2)))
    blades = cv2.resize(blades.astype(np.float32), shape[::-1])
    return _between((45, 80, 25), (140, 175, 70), tone + 0.3 * blades)


def _foliage(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    leaves = _cloudy(generator, shape, shape[1] / 10) + 0.5 * _noise(generator, shape, 6)
    autumn = generator.rand() < 0.3
    low, high = ((70, 40, 20), (220, 140, 50)) if autumn else ((15, 40, 18), (120, 165, 75))
    return _between(low, high, 0.5 + 0.5 * leaves)


def _bricks(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    h = int(generator.randint(14, 26) * shape[0] / 480) + 4
    w = int(2.4 * h)
    y, x = np.mgrid[: shape[0], : shape[1]]
    row = y // h
    column = (x + (row % 2) * (w // 2)) // w
    tones = generator.uniform(0, 1, (int(row.max()) + 1, int(column.max()) + 1))
    red, grey = ((120, 52, 40), (185, 95, 75)), ((125, 120, 112), (190, 184, 172))
    colours = red if generator.rand() < 0.6 else grey
    wall = _between(*colours, tones[row, column].astype(np.float32))
    mortar = ((y % h) < 2) | (((x + (row % 2) * (w // 2)) % w) < 2)
    wall[mortar] = (165, 158, 148)
    return wall * (1 + 0.12 * _cloudy(generator, shape, 12)[..., None])


def _room(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    low, high = (_colour(generator, saturation=(20, 110), value=(60, 230)) for _ in range(2))
    x = np.linspace(0, 1, shape[1], dtype=np.float32)[None].repeat(shape[0], 0)
    wall = _between(low, high, x + 0.3 * _cloudy(generator, shape, shape[1] / 2))
    canvas = wall.clip(0, 255).astype(np.uint8)
    for _ in range(generator.randint(0, 14)):  # lamps out of focus
        light = canvas.copy()
        centre = _point(generator, shape)
        colour = _colour(generator, saturation=(30, 160), value=(200, 255))
        cv2.circle(light, centre, int(generator.uniform(0.015, 0.06) * shape[1]), colour, -1)
        canvas = cv2.addWeighted(light, 0.5, canvas, 0.5, 0)
    return canvas.astype(np.float32)


def _draw_background(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """HxWx3 uint8: one texture, or one over another that meet at a horizon."""
    far: list[Callable] = [_sky, _sky, _foliage, _bricks, _room]
    canvas = far[generator.randint(len(far))](generator, shape)
    if generator.rand() < 0.6:
        near = [_grass, _foliage, _bricks, _grass][generator.randint(4)](generator, shape)
        wave = 0.06 * shape[0] * _noise(generator, (1, shape[1]), shape[1] / 6)[0]
        horizon = generator.uniform(0.5, 0.9) * shape[0] + wave
        below = np.arange(shape[0])[:, None] > horizon[None]
        canvas = np.where(below[..., None], near, canvas)
    canvas = canvas.clip(0, 255).astype(np.uint8)
    blur = generator.uniform(0.3, 3.5)  # the surroundings are often out of focus
    return cv2.GaussianBlur(canvas, (0, 0), blur)


def _colour(
    generator: np.random.RandomState,
    saturation: tuple[int, int] = (150, 255),
    value: tuple[int, int] = (130, 255),
) -> tuple[int, int, int]:
    hsv = [generator.randint(0, 180), generator.randint(*saturation), generator.randint(*value)]
    rgb = cv2.cvtColor(np.uint8([[hsv]]), cv2.COLOR_HSV2RGB)[0, 0]
    return tuple(int(c) for c in rgb)


def _point(generator: np.random.RandomState, shape: tuple[int, int]) -> tuple[int, int]:
    """A place x, y on the canvas."""
    return int(generator.uniform(0, shape[1])), int(generator.uniform(0, shape[0]))


def _draw_distractor(generator: np.random.RandomState, canvas: np.ndarray) -> None:
    """Coloured things that are no balloons: flat signs, striped balls, windows, bunting."""
    shape = canvas.shape[:2]
    centre, colour, second = _point(generator, shape), _colour(generator), _colour(generator)
    radius = int(generator.uniform(0.04, 0.12) * min(shape))
    kind = generator.randint(4)
    if kind == 0:  # a round sign: flat, with a rim
        cv2.circle(canvas, centre, radius, (235, 235, 235), -1, cv2.LINE_AA)
        cv2.circle(canvas, centre, int(radius * 0.85), colour, -1, cv2.LINE_AA)
        bar = (int(radius * 0.55), max(1, int(radius * 0.14)))
        low, high = np.subtract(centre, bar).tolist(), np.add(centre, bar).tolist()
        cv2.rectangle(canvas, low, high, (240, 240, 240), -1)
    elif kind == 1:  # a striped ball
        for k in range(6):
            ends = (60 * k, 60 * k + 60)
            paint = colour if k % 2 else (240, 240, 235)
            cv2.ellipse(canvas, centre, (radius, radius), 20, *ends, paint, -1, cv2.LINE_AA)
    elif kind == 2:  # a window
        corner = (centre[0] + 2 * radius, centre[1] + int(2.6 * radius))
        middle = (centre[0] + radius, centre[1])
        cv2.rectangle(canvas, centre, corner, (60, 75, 95), -1)
        cv2.rectangle(canvas, centre, corner, (225, 222, 215), max(2, radius // 6))
        cv2.line(canvas, middle, (middle[0], corner[1]), (225, 222, 215), max(2, radius // 8))
    else:  # bunting
        step = max(8, radius // 2)
        for k, x in enumerate(range(0, shape[1], step)):
            y = int(centre[1] * 0.5 + radius * np.sin(x / shape[1] * np.pi))
            flag = np.array([[x, y], [x + step * 3 // 4, y], [x + step * 3 // 8, y + step]])
            cv2.fillPoly(canvas, [flag], colour if k % 2 else second, cv2.LINE_AA)


# -------------------------------------------------------------------------------- balloons


def _add_balloon(
    generator: np.random.RandomState, canvas: np.ndarray, masks: list[np.ndarray]
) -> list[np.ndarray]:
    """Draw a balloon in front of the others where all stay visible; returns the new masks."""
    shape = canvas.shape[:2]
    (cx, cy), radius = _place_balloon(generator, shape, masks)
    stretch, tilt = generator.uniform(1.0, 1.35), generator.uniform(-0.45, 0.45)
    colour = balloon_colour(generator)
    string = generator.uniform(-1, 1, 4)

    reach = 1.2 * radius * stretch
    top, left = max(0, int(cy - reach)), max(0, int(cx - reach))
    window = np.s_[top : max(top, int(cy + reach)), left : max(left, int(cx + reach))]
    y, x = np.ogrid[: shape[0], : shape[1]]
    dx, dy = np.float32(x[:, window[1]] - cx), np.float32(y[window[0]] - cy)
    # The balloon's own frame: it fills u^2 + v^2 < 1, and is narrower towards the knot.
    v = (dy * np.cos(tilt) - dx * np.sin(tilt)) / (radius * stretch)
    u = (dy * np.sin(tilt) + dx * np.cos(tilt)) / radius * (1 + 0.16 * v.clip(-1, 1))
    body = u**2 + v**2 < 1
    knot = (v >= 0.97) & (v < 1.09) & (np.abs(u) < 0.35 * (v - 0.9))
    mask = np.zeros(shape, bool)
    mask[window] = body | knot

    remaining = _subtract(masks, mask)
    if remaining is None or mask.sum() < _LEAST_PIXELS * _ZOOM**2:
        return masks
    half = radius * stretch
    _draw_string(canvas, (cx - half * np.sin(tilt), cy + half * np.cos(tilt)), half, string)
    canvas[window][body] = _shade(u[body], v[body], colour, canvas[window][body])
    canvas[window][knot] = (np.array(colour) * 0.55).astype(np.uint8)
    return [*remaining, mask]


def _place_balloon(
    generator: np.random.RandomState, shape: tuple[int, int], masks: list[np.ndarray]
) -> tuple[tuple[float, float], float]:
    """Centre x, y and radius; the first balloon may be large, others often make a bunch."""
    side = min(shape)
    low, high = max(7 * _ZOOM, 0.03 * side), (0.25 if masks else 0.42) * side
    radius = float(np.exp(generator.uniform(np.log(low), np.log(high))))
    if masks and generator.rand() < 0.45:
        y, x = np.argwhere(masks[generator.randint(len(masks))]).mean(axis=0)
        angle = generator.uniform(0, 2 * np.pi)
        return (x + 1.4 * radius * np.cos(angle), y + 1.4 * radius * np.sin(angle)), radius
    margin = min(radius * 0.6, 0.2 * side)
    x = generator.uniform(margin, shape[1] - margin)
    y = generator.uniform(margin, shape[0] - margin) * 0.85
    return (x, y), radius


def balloon_colour(generator: np.random.RandomState) -> tuple[int, int, int]:
    """Mostly strong colours, some white, silver or dark ones."""
    if generator.rand() < 0.85:
        return _colour(generator, saturation=(140, 256), value=(120, 256))
    return _colour(generator, saturation=(0, 40), value=(50, 256))


def _shade(
    u: np.ndarray, v: np.ndarray, colour: tuple[int, int, int], behind: np.ndarray
) -> np.ndarray:
    """Latex in the light from the upper left: Nx3 uint8 for N places on the balloon."""
    depth = np.sqrt((1 - u**2 - v**2).clip(0, 1))
    light = (-0.5 * u - 0.6 * v + 0.62 * depth).clip(-0.3, 1)
    rim = (1 - depth) ** 4
    paint = np.float32(colour) * (0.55 + 0.5 * light)[:, None]
    paint = paint * (1 - 0.25 * rim)[:, None] + 40 * rim[:, None]
    paint = 0.93 * paint + 0.07 * behind  # a little light comes through
    spot = np.exp(-((u + 0.38) ** 2 * 22 + (v + 0.45) ** 2 * 14))
    glow = 0.25 * np.exp(-((u - 0.35) ** 2 + (v - 0.5) ** 2) * 8)
    paint += (255 - paint).clip(0) * (0.85 * spot + glow)[:, None].clip(0, 1)
    return paint.clip(0, 255).astype(np.uint8)


def _draw_string(
    canvas: np.ndarray, knot: tuple[float, float], half_length: float, form: np.ndarray
) -> None:
    """A string that hangs from the knot in a loose curve; ``form`` is four numbers in +-1."""
    t = np.linspace(0, 1, 24)
    x = knot[0] + 0.5 * form[0] * half_length * np.sin(t * (3.5 + 1.5 * form[1])) * t
    y = knot[1] + (2.5 + 1.5 * form[2]) * half_length * t
    points = np.stack([x, y], axis=1).astype(np.int32)
    tone = int(160 + 80 * form[3])
    cv2.polylines(canvas, [points], False, (tone, tone, tone), 1, cv2.LINE_AA)


def _subtract(masks: list[np.ndarray], front: np.ndarray) -> list[np.ndarray] | None:
    """What is left of ``masks`` behind ``front``; None if one of them would be spoilt."""
    remaining = []
    for mask in masks:
        if (mask & front).any():
            least = max(_LEAST_VISIBLE * mask.sum(), _LEAST_PIXELS * _ZOOM**2)
            mask = mask & ~front
            if mask.sum() < least or not _has_one_outline(mask):
                return None
        remaining.append(mask)
    return remaining


def _has_one_outline(mask: np.ndarray) -> bool:
    """Whether a single polygon can tell the mask: hardly a second piece, hardly a hole."""
    outline = _outer_contour(mask)
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), [outline], -1, 1, -1) > 0
    return (filled & mask).sum() >= 0.95 * (filled | mask).sum()


def _outer_contour(mask: np.ndarray) -> np.ndarray:
    """Around the largest piece of a mask: Nx1x2 int32, each x, y."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return max(contours, key=cv2.contourArea)


def _add_occluder(
    generator: np.random.RandomState, canvas: np.ndarray, masks: list[np.ndarray]
) -> list[np.ndarray]:
    """Draw something in front where the balloons stay visible; returns the new masks."""
    layer, front = canvas.copy(), np.zeros(canvas.shape[:2], np.uint8)
    kind = generator.randint(3)
    if kind == 0:
        _draw_post(generator, canvas)  # thin: a person draws the outline across it
        return masks
    [_draw_leaves, _draw_person][kind - 1](generator, layer, front)
    remaining = _subtract(masks, front > 0)
    if remaining is None:
        return masks
    canvas[:] = layer
    return remaining


def _draw_post(generator: np.random.RandomState, canvas: np.ndarray) -> None:
    height, width = canvas.shape[:2]
    x = int(generator.uniform(0.05, 0.95) * width)
    lean = int(generator.uniform(-0.05, 0.05) * width)
    tone = generator.randint(40, 150)
    colour = (int(tone), int(tone * 0.9), int(tone * 0.75))
    thickness = max(2, int(0.008 * width))
    cv2.line(canvas, (x, 0), (x + lean, height), colour, thickness, cv2.LINE_AA)


def _draw_leaves(generator: np.random.RandomState, layer: np.ndarray, front: np.ndarray) -> None:
    """A branch that reaches in from a corner."""
    shape = layer.shape[:2]
    corner = (shape[1] * generator.randint(2), int(shape[0] * generator.uniform(0, 1)))
    for _ in range(generator.randint(8, 22)):
        spread = generator.normal(0, 0.11, 2) * min(shape)
        centre = (int(corner[0] + spread[0]), int(corner[1] + spread[1]))
        axes = (int(0.06 * min(shape)), int(0.022 * min(shape)))
        angle, tone = generator.uniform(0, 180), generator.uniform(0.5, 1.2)
        colour = tuple(int(c * tone) for c in (60, 115, 45))
        cv2.ellipse(layer, centre, axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
        cv2.ellipse(front, centre, axes, angle, 0, 360, 1, -1)


def _draw_person(generator: np.random.RandomState, layer: np.ndarray, front: np.ndarray) -> None:
    """Somebody who stands in the foreground: head, hair, shoulders."""
    shape = layer.shape[:2]
    head = int(generator.uniform(0.05, 0.09) * min(shape))
    x = int(generator.uniform(0.05, 0.95) * shape[1])
    y = int(generator.uniform(0.62, 0.9) * shape[0])
    skin = np.array((232, 190, 160)) * generator.uniform(0.4, 1.0)
    shirt = _colour(generator, saturation=(20, 220), value=(50, 240))
    hair = np.array((90, 60, 40)) * generator.uniform(0.3, 1.6)
    trunk = ((x, y + int(3.6 * head)), (int(1.9 * head), int(2.6 * head)))
    parts = (
        (*trunk, shirt),
        ((x, y - head // 4), (int(0.85 * head), head), hair),
        ((x, y + head // 6), (int(0.72 * head), int(0.85 * head)), skin),
    )
    for centre, axes, colour in parts:
        colour = tuple(int(c) for c in colour)
        cv2.ellipse(layer, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)
        cv2.ellipse(front, centre, axes, 0, 0, 360, 1, -1)


def _photograph(generator: np.random.RandomState, image: np.ndarray) -> np.ndarray:
    """Exposure, warmth, corners in shade and sensor noise: uint8."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    shade = 1 - generator.uniform(0, 0.25) * (x**2 + y**2) / 2
    warmth = generator.uniform(0.93, 1.07)
    gain = generator.uniform(0.8, 1.12) * np.float32([warmth, 1.0, 1 / warmth])
    noise = generator.normal(0, generator.uniform(1, 5), image.shape)
    return (image * gain * shade[..., None] + noise).clip(0, 255).astype(np.uint8)
