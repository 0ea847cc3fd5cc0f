"""Synthetic scenes with captions: one coloured shape moves over a background, with a sound that belongs to it.

    python scripts/demo_scenes.py --sheet scenes.png [--seed 1]

A scene follows from its seed alone. Its sound is tied to the picture: every shape has its own pitch, the stereo
position follows the shape, the loudness follows its size where that changes, and a bouncing shape clicks when it lands.
Pitches are multiples of 100 Hz, the rate of mel frames, so that every mel frame of a tone or a click meets the same
phase, and a small vocoder can get the waveform itself right.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, FRAMES, FPS = 128, 96, 49, 24.0
SAMPLE_RATE = 48_000

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (225, 45, 40),
    "green": (45, 185, 65),
    "blue": (60, 105, 240),
    "yellow": (245, 215, 45),
    "purple": (185, 60, 210),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (14, 14, 18),
    "grey": (100, 102, 106),
    "brown": (84, 56, 36),
    "navy": (22, 30, 82),
}
PITCHES = {"circle": 200, "square": 400, "triangle": 600, "star": 800}
SHAPES = tuple(PITCHES)
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "rotate", "bounce")
RADII = {"small": 0.18, "medium": 0.22, "large": 0.26}  # of the picture's height

TONE, QUIET_TONE, CLICK = 0.22, 0.08, 0.7
SILENT_END = 0.06  # seconds
EXTENT = 1.25  # corners and edges of shapes lie no farther than so many radii
CLICK_PITCH, CLICK_SECONDS, CLICK_DECAY = 2500, 0.04, 0.008
OVERTONE = 0.25  # the octave's part of a tone


@dataclass(frozen=True)
class Scene:
    """What is to be seen and heard; lengths in parts of the picture's height, times in seconds.

    Attributes:
        end: the background's colour at the bottom, where it fades from ``background`` at the top; None if it is plain.
        size: of the shape, a name in ``RADII`` (ignored by growing and shrinking ones).
        centre: where the middle of its path lies, x to the right and y downwards.
        reach: how far it moves in all, how high it bounces, how much of a turn it rotates clockwise.
        period: seconds from one bounce to the next.
        first: when it lands first.
        caption: a sentence that says so.
    """

    colour: str
    shape: str
    motion: str
    background: str
    end: str | None
    size: str
    centre: tuple[float, float]
    reach: float
    period: float
    first: float
    caption: str
    frames: int = FRAMES
    fps: float = FPS

    @property
    def duration(self) -> float:
        return self.frames / self.fps

    @property
    def pitch(self) -> int:
        """Of its tone, in Hz."""
        return PITCHES[self.shape]

    def landings(self) -> np.ndarray:
        """Times at which it lands, within the clip; nothing unless it bounces."""
        if self.motion != "bounce":
            return np.zeros(0)
        return np.arange(self.first, self.duration - CLICK_SECONDS, self.period)

    def place(self, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Its x, y, radius and angle (radians) at some times; arrays like ``time``."""
        part = time / self.duration  # of its way
        x, y = np.full_like(time, self.centre[0]), np.full_like(time, self.centre[1])
        radius, angle = np.full_like(time, RADII[self.size]), np.zeros_like(time)
        if self.motion in ("left", "right"):
            x += (part - 0.5) * self.reach * (1 if self.motion == "right" else -1)
        elif self.motion in ("up", "down"):
            y += (part - 0.5) * self.reach * (1 if self.motion == "down" else -1)
        elif self.motion in ("grow", "shrink"):
            radius = 0.12 + 0.2 * (part if self.motion == "grow" else 1 - part)
        elif self.motion == "rotate":
            angle = 2 * np.pi * part * self.reach
        else:
            phase = (time - self.first) / self.period % 1
            y = 0.94 - radius - self.reach * 4 * phase * (1 - phase)
        return x, y, radius, angle


MOVES = {
    "left": ("moves to the left", "slides left", "drifts from right to left", "glides leftwards", "travels left"),
    "right": ("moves to the right", "slides right", "drifts from left to right", "glides rightwards", "travels right"),
    "up": ("moves up", "rises", "floats upwards", "climbs to the top", "goes up slowly"),
    "down": ("moves down", "sinks", "floats downwards", "falls slowly", "goes down"),
    "grow": ("grows", "gets bigger", "becomes larger and larger", "swells", "expands"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller and smaller", "contracts", "dwindles"),
    "rotate": ("rotates", "spins", "turns around", "is rotating", "spins on the spot"),
    "bounce": ("bounces", "bounces up and down", "jumps up and down", "hops on the ground", "is bouncing"),
}
TONES = {
    "circle": ("a low hum", "a deep tone", "a very low sound"),
    "square": ("a middle tone", "a calm tone", "a medium hum"),
    "triangle": ("a high tone", "a bright tone", "a high note"),
    "star": ("a very high tone", "a shrill note", "the highest tone"),
}
CLICKS = ("a click at every landing", "clicks when it lands", "a click each time it hits the ground")
FORMS = (
    "{A} {what} {does} {where}{sound}.",
    "{Where}, {a} {what} {does}{sound}.",
    "{A} {what} that {does}, {where}{sound}.",
    "video of {a} {what}: it {does} {where}{sound}",
    "{A} {what} {does}{sound}. The background is {ground}.",
    "{Ground} background. {A} {what} {does}{sound}.",
)


def write_caption(rng: np.random.Generator, scene: Scene) -> str:
    """One of many sentences that fit the scene."""

    def any_of(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    named = scene.motion not in ("grow", "shrink") and scene.size != "medium"
    what = f"{scene.size} {scene.colour} {scene.shape}" if named else f"{scene.colour} {scene.shape}"
    if scene.end is None:
        ground, where = scene.background, any_of(("on a {} background", "in front of {}", "over a plain {} background"))
        where = where.format(ground)
    else:
        ground = f"{scene.background} fading to {scene.end}"
        where = f"over a gradient from {scene.background} to {scene.end}"
    sound = ""
    if rng.random() < 0.4:
        heard = any_of(TONES[scene.shape])
        if scene.motion == "bounce" and rng.random() < 0.7:
            heard = any_of(CLICKS)
        sound = any_of((" with {}", ", {}", " to the sound of {}")).format(heard)
    article = any_of(("a", "a", "the", "one"))
    return any_of(FORMS).format(
        a=article, A=article.capitalize(), what=what, does=any_of(MOVES[scene.motion]), where=where,
        Where=where[0].upper() + where[1:], ground=ground, Ground=ground[0].upper() + ground[1:], sound=sound,
    )  # fmt: skip


def make_scene(seed: int, **fixed: str | None) -> Scene:
    """The scene of a seed; ``fixed`` gives some of colour, shape, motion, background, end and size; None leaves it."""
    rng = np.random.default_rng([seed, 71])

    def choose(name: str, options: tuple[str, ...]) -> str:
        choice = options[rng.integers(len(options))]
        return fixed.get(name) or choice

    colour, motion = choose("colour", tuple(COLOURS)), choose("motion", MOTIONS)
    # A turning circle looks like a resting one.
    shape = choose("shape", SHAPES if motion != "rotate" else SHAPES[1:])
    background = choose("background", tuple(BACKGROUNDS))
    other = tuple(name for name in BACKGROUNDS if name != background)
    end = other[rng.integers(len(other))] if rng.random() < 0.3 else None
    size = choose("size", tuple(RADII))
    wide, radius = WIDTH / HEIGHT, RADII[size]
    x, y = wide / 2 + rng.uniform(-0.25, 0.25), rng.uniform(0.4, 0.6)
    period, first = rng.uniform(0.55, 0.8), rng.uniform(0.15, 0.5)
    reach = rng.uniform(0.4, 0.6)
    if motion == "bounce":
        reach = min(reach, 0.92 - 2 * radius)
    if motion in ("left", "right"):
        reach = rng.uniform(0.75, 1.0) * (wide - 2 * radius)
        x = wide / 2
    elif motion in ("up", "down"):
        reach = rng.uniform(0.8, 1.0) * (0.98 - 2 * radius)
        y = 0.5
    elif motion == "rotate":
        reach = 0.5 + 0.02 * rng.choice([-1, 1])  # Always clockwise: what could turn either way comes out round.
    scene = Scene(colour, shape, motion, background, end, size, (x, y), reach, period, first, "")
    return replace(scene, caption=write_caption(rng, scene))


def outline(shape: str) -> np.ndarray:
    """Corners (N, 2) of a shape of radius 1 that is no circle, y downwards, one after another."""
    if shape == "square":
        return 0.88 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    count, inner = (3, None) if shape == "triangle" else (5, 0.42)
    turns = np.arange(count) / count
    corners = np.stack([np.sin(2 * np.pi * turns), -np.cos(2 * np.pi * turns)], axis=1)
    if inner is None:
        return 1.15 * corners
    between = np.stack([np.sin(2 * np.pi * (turns + 0.1)), -np.cos(2 * np.pi * (turns + 0.1))], axis=1)
    return 1.15 * np.stack([corners, inner * between], axis=1).reshape(-1, 2)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far points are from the edge of a shape of radius 1 around 0; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    corners = outline(shape)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        along = np.clip(along, 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return np.where(inside, -nearest, nearest)


def draw(scene: Scene, width: int = WIDTH, height: int = HEIGHT, shown: range | None = None) -> np.ndarray:
    """The frames (or those ``shown``), uint8 (F, height, width, 3), with smooth edges."""
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / height
    top = np.array(BACKGROUNDS[scene.background], np.float32)
    bottom = np.array(BACKGROUNDS[scene.end or scene.background], np.float32)
    ground = top + (bottom - top) * rows[:, None, None].astype(np.float32)
    ground = np.broadcast_to(ground, (height, width, 3))
    colour = np.array(COLOURS[scene.colour], np.float32)
    shown = range(scene.frames) if shown is None else shown
    frames = np.empty((len(shown), height, width, 3), np.uint8)
    x, y, radius, angle = scene.place(np.array(shown) / scene.fps)
    plain = np.rint(ground).astype(np.uint8)
    for index in range(len(shown)):
        # only where the shape can be
        far = EXTENT * radius[index] + 1 / height
        top, bottom = np.searchsorted(rows, (y[index] - far, y[index] + far))
        left, right = np.searchsorted(columns, (x[index] - far, x[index] + far))
        near = slice(top, bottom), slice(left, right)
        dx, dy = (columns[near[1]] - x[index]) / radius[index], (rows[near[0], None] - y[index]) / radius[index]
        c, s = np.cos(angle[index]), np.sin(angle[index])
        covered = np.clip(0.5 - distance(scene.shape, c * dx + s * dy, c * dy - s * dx) * radius[index] * height, 0, 1)
        covered = covered[..., None].astype(np.float32)
        frames[index] = plain
        frames[index][near] = np.rint(ground[near] + covered * (colour - ground[near]))
    return frames


def play(scene: Scene, rate: int = SAMPLE_RATE) -> np.ndarray:
    """The sound, float32 (samples, 2) in [-1, 1]."""
    time = np.arange(round(scene.duration * rate)) / rate
    x, _, radius, _ = scene.place(time)
    loudness = QUIET_TONE if scene.motion == "bounce" else TONE
    if scene.motion in ("grow", "shrink"):
        loudness = loudness * 1.5 * radius / radius.max()
    tone = np.sin(2 * np.pi * scene.pitch * time) + OVERTONE * np.sin(4 * np.pi * scene.pitch * time)
    # No step at the beginning and the end; and an end that is before that of the last whole latent.
    edge = np.clip(np.minimum(time, scene.duration - SILENT_END - time) / 0.02, 0, 1)
    mono = loudness * tone * edge
    decay = np.exp(-np.arange(round(CLICK_SECONDS * rate)) / rate / CLICK_DECAY)
    for landing in scene.landings():
        during = slice(round(landing * rate), round(landing * rate) + len(decay))
        mono[during] += CLICK * decay * np.sin(2 * np.pi * CLICK_PITCH * time[during])
    position = np.clip(x * HEIGHT / WIDTH, 0, 1) * np.pi / 2
    return np.stack([mono * np.cos(position), mono * np.sin(position)], axis=1).astype(np.float32)


def sheet(rows: list[tuple[str, np.ndarray]], path: Path, frames: int = 6, scale: int = 1) -> None:
    """A picture of some clips, each a row of frames under its caption."""
    height, width = (side * scale for side in rows[0][1].shape[1:3])
    image = Image.new("RGB", (frames * (width + 4), len(rows) * (height + 18)), "white")
    for row, (caption, clip) in enumerate(rows):
        ImageDraw.Draw(image).text((2, row * (height + 18) + 2), caption, fill="black")
        for column, index in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
            frame = Image.fromarray(clip[index]).resize((width, height), Image.Resampling.NEAREST)
            image.paste(frame, (column * (width + 4), row * (height + 18) + 15))
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sheet", type=Path, required=True, help="a PNG with some scenes")
    parser.add_argument("--seed", type=int, default=1, help="of the first one")
    parser.add_argument("--count", type=int, default=12)
    arguments = parser.parse_args()
    scenes = [make_scene(arguments.seed + index) for index in range(arguments.count)]
    sheet([(scene.caption, draw(scene)) for scene in scenes], arguments.sheet)


if __name__ == "__main__":
    main()
