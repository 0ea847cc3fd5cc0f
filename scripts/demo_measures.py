"""What a clip of the demo's kind shows and plays, told from its pixels and samples alone.

``scripts/measure_demo.py`` compares this with what the prompt asked for. About the scenes themselves every measure is
right; tests hold that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo_scenes import COLOURS, PITCHES, SHAPES, distance

DIFFERENT = 45  # how far a channel of a pixel must be from the background's
LEAST_PIXELS = 20
MARGIN = 6  # pixels around a shape
ANGLES = np.deg2rad(np.arange(0, 120, 10))
SYNCHRONOUS = 0.1  # seconds
CLICK_BAND = 1800  # Hz; tones and their overtones lie below
STEP = 0.005  # seconds between loudnesses
FAINTEST = 0.05  # root mean square of a click; those of scenes have 0.25


@dataclass(frozen=True)
class Seen:
    """The shape in every frame; lengths in parts of the picture's height.

    Attributes:
        masks: bool (F, H, W).
        x, y, area: (F,), NaN where nothing is seen.
        colour: mean RGB of its inside, or None if nothing is seen.
    """

    masks: np.ndarray
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray
    colour: np.ndarray | None

    @property
    def found(self) -> np.ndarray:
        return ~np.isnan(self.x)


def look(frames: np.ndarray) -> Seen:
    """Separate the shape from its background in uint8 frames (F, H, W, 3).

    The background is each row's commonest colour: a shape is never as wide as half the picture for half the time.
    """
    F, H, W, _ = frames.shape
    values = frames.astype(np.float32)
    ground = np.median(values.transpose(1, 0, 2, 3).reshape(H, F * W, 3), axis=1)
    masks = np.abs(values - ground[None, :, None]).max(axis=-1) > DIFFERENT
    rows, columns = (np.arange(H) + 0.5) / H, (np.arange(W) + 0.5) / H
    x, y, area = np.full(F, np.nan), np.full(F, np.nan), np.full(F, np.nan)
    least = LEAST_PIXELS * H * W / (96 * 128)
    inside = []
    for index, mask in enumerate(masks):
        if mask.sum() < least:
            continue
        x[index] = (mask.sum(axis=0) * columns).sum() / mask.sum()
        y[index] = (mask.sum(axis=1) * rows).sum() / mask.sum()
        area[index] = mask.sum() / H**2
        core = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        inside.append(values[index, 1:-1, 1:-1][core] if core.any() else values[index][mask])
    colour = np.median(np.concatenate(inside), axis=0) if inside else None
    return Seen(masks, x, y, area, colour)


def colour_of(seen: Seen) -> str | None:
    """The nearest of the known colours."""
    if seen.colour is None:
        return None
    return min(COLOURS, key=lambda name: float(np.square(seen.colour - np.array(COLOURS[name])).sum()))


def shape_of(seen: Seen, looks: int = 7) -> str | None:
    """The shape whose outline, at the same place and area and at some angle, covers most of what is seen.

    In each of some frames the best one is found; their median overlaps decide.
    """
    found = np.flatnonzero(seen.found)
    if not len(found):
        return None
    # where it is largest there is most to see
    chosen = found[np.argsort(-seen.area[found])[: max(looks, len(found) // 2)]]
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(looks, len(chosen))).astype(int)]
    H, W = seen.masks.shape[1:]
    rows, columns = (np.arange(H)[:, None] + 0.5) / H, (np.arange(W)[None] + 0.5) / H
    overlaps: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for index in chosen:
        mask, middle, area = seen.masks[index], (seen.x[index], seen.y[index]), seen.area[index]
        # only where it is, and a little around, is looked at
        around = tuple(slice(max(0, places.min() - MARGIN), places.max() + MARGIN) for places in np.nonzero(mask))
        inside = mask[around], rows[around[0]], columns[:, around[1]]
        for shape in SHAPES:
            angles = ANGLES if shape != "circle" else ANGLES[:1]
            overlaps[shape].append(max(_overlap(*inside, shape, angle, middle, area) for angle in angles))
    return max(SHAPES, key=lambda shape: float(np.median(overlaps[shape])))


def _unit_area(shape: str) -> float:
    """The area of a shape of radius 1."""
    side = np.linspace(-1.3, 1.3, 261)
    return float((distance(shape, side[None] + 0 * side[:, None], side[:, None] + 0 * side[None]) < 0).sum() * 1e-4)


AREAS = {shape: _unit_area(shape) for shape in SHAPES}


def _overlap(
    mask: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    shape: str,
    angle: float,
    middle: tuple[float, float],
    area: float,
) -> float:
    """Intersection over union of a mask and a shape of its area at its place."""
    radius = np.sqrt(area / AREAS[shape])
    dx, dy = (columns - middle[0]) / radius, (rows - middle[1]) / radius
    c, s = np.cos(angle), np.sin(angle)
    covered = distance(shape, c * dx + s * dy, c * dy - s * dx) < 0
    return float((covered & mask).sum() / (covered | mask).sum())


def motion_of(seen: Seen) -> str | None:
    """How it moves: the largest of what changes, each in parts of what the scenes do at least.

    A path up and down is bouncing if it goes back by a good part of its height, otherwise rising or sinking.
    """
    found = np.flatnonzero(seen.found)
    if len(found) < len(seen.x) // 2:
        return None
    x, y, area = (_smooth(values[found]) for values in (seen.x, seen.y, seen.area))
    across, along, grown = x[-1] - x[0], y[-1] - y[0], np.log(area[-1] / area[0])
    height = y.max() - y.min()
    back = np.minimum(np.maximum.accumulate(y) - y, 1).max(), (y - np.minimum.accumulate(y)).max()
    amounts = {
        "right" if across > 0 else "left": abs(across) / 0.4,
        "grow" if grown > 0 else "shrink": abs(grown) / 1.0,
        "down" if along > 0 else "up": abs(along) / 0.3,
        "bounce": min(back) / 0.12,
    }
    if amounts["bounce"] > 1 and height > 0.15 and abs(across) < 0.3:
        return "bounce"
    amounts.pop("bounce")
    best = max(amounts, key=lambda name: amounts[name])
    if amounts[best] > 0.6:
        return best
    return "rotate" if _turns(seen, found) else "still"


def _smooth(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, 1, mode="edge")
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def _turns(seen: Seen, found: np.ndarray) -> bool:
    """Whether what is seen around its middle changes although it stays where it is."""
    first = seen.masks[found[0]]
    overlaps = [(first & seen.masks[index]).sum() / (first | seen.masks[index]).sum() for index in found]
    return min(overlaps) < 0.82


def pitch_of(waveform: np.ndarray, rate: int) -> float | None:
    """The strongest frequency from 100 to 1500 Hz of a sound (samples, 2), in Hz; None if there is hardly any."""
    mono = waveform.mean(axis=1)
    if np.sqrt(np.mean(mono**2)) < 0.005:
        return None
    spectrum = np.abs(np.fft.rfft(mono * np.hanning(len(mono))))
    frequencies = np.fft.rfftfreq(len(mono), 1 / rate)
    band = (frequencies > 100) & (frequencies < 1500)
    return float(frequencies[band][spectrum[band].argmax()])


def right_pitch(waveform: np.ndarray, rate: int, shape: str) -> bool:
    pitch = pitch_of(waveform, rate)
    return pitch is not None and abs(pitch - PITCHES[shape]) < 50


def clicks_of(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Times at which something short and bright begins, in seconds."""
    mono = waveform.mean(axis=1)
    spectrum = np.fft.rfft(mono)
    spectrum[np.fft.rfftfreq(len(mono), 1 / rate) < CLICK_BAND] = 0
    bright = np.fft.irfft(spectrum, len(mono))
    step = round(STEP * rate)
    loud = np.sqrt(np.square(bright[: len(bright) // step * step]).reshape(-1, step).mean(axis=1))
    if not len(loud) or loud.max() < FAINTEST:
        return np.zeros(0)
    times: list[float] = []
    for index in range(len(loud)):
        before = loud[max(0, index - 6) : index]
        begins = loud[index] > 0.3 * loud.max() and (not len(before) or loud[index] > 2.5 * before.min())
        if begins and (not times or index * STEP - times[-1] > 0.15):
            times.append(index * STEP)
    return np.array(times)


def landings_of(seen: Seen, fps: float) -> np.ndarray:
    """Times at which it is lowest between going down and going up, to parts of a frame, in seconds."""
    y, times = seen.y, []
    if not seen.found.any():
        return np.zeros(0)
    floor = np.nanmax(y)
    for index in range(1, len(y) - 1):
        before, here, after = y[index - 1 : index + 2]
        if np.isnan([before, here, after]).any() or here < before or here <= after or here < floor - 0.12:
            continue
        slope = max(here - before, here - after, 1e-6)
        times.append((index + 0.5 * ((here - before) - (here - after)) * -1 / slope) / fps)
    kept: list[float] = []
    for time in times:
        if not kept or time - kept[-1] > 0.2:
            kept.append(time)
    return np.array(kept)


def in_sync(clicks: np.ndarray, landings: np.ndarray, duration: float) -> bool:
    """Whether every click has a landing within 100 ms and every landing a click; those at the ends need none."""
    if not len(clicks) or not len(landings):
        return False
    gaps = np.abs(clicks[:, None] - landings[None])
    inner_clicks = (clicks > SYNCHRONOUS) & (clicks < duration - SYNCHRONOUS)
    inner_landings = (landings > SYNCHRONOUS) & (landings < duration - SYNCHRONOUS)
    every_click = (gaps.min(axis=1) <= SYNCHRONOUS)[inner_clicks].all()
    every_landing = (gaps.min(axis=0) <= SYNCHRONOUS)[inner_landings].all()
    return bool(every_click and every_landing)


def follows(waveform: np.ndarray, rate: int, seen: Seen, fps: float) -> bool:
    """Whether the sound goes to the side that the shape goes to."""
    length = round(rate / fps)
    count = min(len(seen.x), len(waveform) // length)
    power = np.square(waveform[: count * length]).reshape(count, length, 2).mean(axis=1) + 1e-9
    side = (power[:, 1] - power[:, 0]) / power.sum(axis=1)
    x, inner = seen.x[:count], slice(3, count - 3)  # tones fade at the ends
    both = ~np.isnan(x[inner])
    if both.sum() < 8:
        return False
    return bool(np.corrcoef(x[inner][both], side[inner][both])[0, 1] > 0.7)
