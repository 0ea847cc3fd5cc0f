"""Does the demo do what its prompt says? Measures on prompts and seeds that it was not trained on.

python scripts/measure_demo.py [--model demo] [--clips 40] [--sounds 10] [--json measures.json] [--sheet clips.png]
python scripts/measure_demo.py --truth      # the measures on the scenes themselves, which should be all right
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import mlx_ltx
from demo_measures import clicks_of, colour_of, follows, in_sync, landings_of, look, motion_of, right_pitch, shape_of
from demo_scenes import FPS, FRAMES, HEIGHT, SAMPLE_RATE, WIDTH, Scene, draw, make_scene, play, sheet
from mlx_ltx.media.audio import write_audio
from mlx_ltx.media.video import read_frames

FIRST_SEED = 9_000_000  # far from those of the training
FIRST_SOUND = 9_100_000
Result = dict[str, bool]


def judge(scene: Scene, frames: np.ndarray, waveform: np.ndarray, rate: int) -> Result:
    """What is right about a clip; a question that its scene does not ask is left out."""
    seen = look(frames)
    motion = motion_of(seen)
    result = {
        "colour": colour_of(seen) == scene.colour,
        "shape": shape_of(seen) == scene.shape,
        "motion": motion == scene.motion,
        "pitch": right_pitch(waveform, rate, scene.shape),
    }
    if scene.motion in ("left", "right"):
        result["stereo"] = follows(waveform, rate, seen, scene.fps)
    clicks = clicks_of(waveform, rate)
    if scene.motion == "bounce":
        result["sync"] = in_sync(clicks, landings_of(seen, scene.fps), scene.duration)
    else:
        result["no clicks"] = not len(clicks)
    return result


def generate(scene: Scene, seed: int, arguments: argparse.Namespace, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames and sound of the clip that the model makes of the scene's caption."""
    pipeline = {} if arguments.pipeline is None else {"pipeline": arguments.pipeline}
    sound = folder / "clip.wav"
    frames = make_frames(scene, seed, arguments.model, folder, output_audio=sound, **pipeline)
    waveform, rate = soundfile.read(sound)
    assert rate == SAMPLE_RATE
    return frames, waveform


def make_frames(scene: Scene, seed: int, model: str, folder: Path, **settings: Any) -> np.ndarray:
    """What a request for the scene's caption shows, uint8 (F, H, W, 3)."""
    video = folder / "clip.mp4"
    request = mlx_ltx.Request(
        prompt=scene.caption, model=model, width=WIDTH, height=HEIGHT, num_frames=FRAMES, fps=FPS, seed=seed,
        dtype="float32", output=video, force=True, **settings,
    )  # fmt: skip
    mlx_ltx.run(request)
    return np.stack(list(read_frames(video)))


def follows_sound(index: int, model: str, folder: Path) -> bool:
    """Whether a shape lands when a sound that is given clicks."""
    scene = make_scene(FIRST_SOUND + index, motion="bounce")
    sound = folder / "given.wav"
    write_audio(sound, play(scene), SAMPLE_RATE, force=True)
    frames = make_frames(scene, index, model, folder, pipeline="a2v", guided=False, audio_path=sound)
    return in_sync(scene.landings(), landings_of(look(frames), FPS), scene.duration)


def table(results: list[Result]) -> dict[str, tuple[int, int]]:
    """Each question's right answers and how often it was asked."""
    names = list(dict.fromkeys(name for result in results for name in result))
    return {
        name: (sum(result.get(name, False) for result in results), sum(name in result for result in results))
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pipeline", help="by default the model's own")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--sounds", type=int, default=0, help="so many clips of a shape that bounces to a given sound")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--sheet", type=Path, help="where to write a picture of the first twelve clips")
    parser.add_argument("--truth", action="store_true", help="measure the scenes themselves instead of a model")
    arguments = parser.parse_args()
    results, rows, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(arguments.clips):
            scene = make_scene(FIRST_SEED + index)
            started = time.perf_counter()
            if arguments.truth:
                frames, waveform = draw(scene), play(scene)
            else:
                frames, waveform = generate(scene, index, arguments, Path(folder))
            seconds.append(time.perf_counter() - started)
            results.append(judge(scene, frames, waveform, SAMPLE_RATE))
            wrong = [name for name, right in results[-1].items() if not right]
            print(
                f"{index + 1:3} {seconds[-1]:5.1f} s  {scene.caption}  {'wrong: ' + ', '.join(wrong) if wrong else ''}"
            )
            if len(rows) < 12:
                rows.append((scene.caption, frames))
        for index in range(arguments.sounds):
            results.append({"a2v": follows_sound(index, arguments.model, Path(folder))})
    found = table(results)
    print()
    for name, (right, asked) in found.items():
        print(f"{name:10} {right:4} of {asked:4}  {100 * right / asked:5.1f}%")
    print(f"{'seconds':10} {np.median(seconds):.1f} a clip (median)")
    if arguments.json:
        numbers = {name: {"right": right, "asked": asked} for name, (right, asked) in found.items()}
        numbers["seconds"] = round(float(np.median(seconds)), 2)
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n")
    if arguments.sheet:
        sheet(rows, arguments.sheet)


if __name__ == "__main__":
    main()
