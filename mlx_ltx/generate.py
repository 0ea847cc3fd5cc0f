"""``python -m mlx_ltx.generate``: the command line, a thin caller of :func:`mlx_ltx.stream`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from mlx_ltx import display
from mlx_ltx.errors import UserError
from mlx_ltx.request import DEFAULT_FPS, DEFAULT_SEED, DTYPES, ImageInput, Request
from mlx_ltx.version import __version__

EXAMPLES = """\
examples:
  python -m mlx_ltx.generate --prompt "a lighthouse at dusk, waves and gulls" --output lighthouse.mp4
  python -m mlx_ltx.generate --model demo --prompt "anything" --output demo.mp4
  python -m mlx_ltx.generate --prompt "she turns and smiles" --image portrait.jpg --output smile.mp4
  python -m mlx_ltx.generate --replay lighthouse.mp4 --seed 11 --output lighthouse-11.mp4
"""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class ImageAction(argparse.Action):
    """``--image PATH [FRAME [STRENGTH]]``, repeatable."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            left_out = ["0", "1.0"][len(values) - 1 :]
            path, frame, strength = list(values) + left_out
            image = ImageInput(Path(path), int(frame), float(strength))
        except ValueError:
            parser.error(
                f"--image {' '.join(values)}: give PATH, then a whole frame number, then a strength from 0 to 1"
            )
        namespace.images = (*(getattr(namespace, "images", None) or ()), image)


def build_parser() -> Parser:
    """All flags. What is not given is absent from the namespace, so that --replay can tell."""
    parser = Parser(
        prog="mlx_ltx.generate",
        usage="python -m mlx_ltx.generate --prompt TEXT --output FILE.mp4 [flags]",
        description="Make a video with synchronised stereo sound from text and images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to make")
    prompt = what.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="what is seen and heard; - reads it from standard input")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    what.add_argument(
        "--image",
        action=ImageAction,
        nargs="+",
        metavar=("PATH", "FRAME STRENGTH"),
        dest="images",
        help="show this image at a frame (0, the first) with a strength (1); may be repeated",
    )
    what.add_argument("--no-audio", dest="audio", action="store_false", help="make a silent clip")
    what.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 32, or of 64 in two stages")
    what.add_argument("--height", type=int, metavar="PIXELS", help="likewise")
    length = what.add_mutually_exclusive_group()
    length.add_argument("--num-frames", "-n", type=int, metavar="N", help="frames, 8k+1 (121)")
    length.add_argument("--duration", type=float, metavar="SECONDS", help="instead, rounded to such a number of frames")
    what.add_argument("--fps", "--frame-rate", type=float, metavar="N", help=f"frames per second ({DEFAULT_FPS:g})")
    what.add_argument("--seed", type=int, metavar="N", help=f"another seed, another clip ({DEFAULT_SEED})")

    model = parser.add_argument_group("with which model")
    model.add_argument(
        "--model",
        "-m",
        metavar="NAME|PATH|HUB_ID",
        help="a name (python -m mlx_ltx.checkpoints list), a checkpoint or folder, or owner/name on the hub; "
        "by default the best model on this machine",
    )
    model.add_argument("--pipeline", metavar="NAME", help="distilled or one-stage; by default what suits the model")
    model.add_argument("--text-encoder", metavar="PATH|HUB_ID", help="a Gemma 3 folder other than the model's own")
    model.add_argument("--spatial-upsampler", metavar="FILE", help="a latent x2 upsampler other than the model's own")
    model.add_argument("--dtype", choices=DTYPES, help="precision (auto: bfloat16, or float32 on the CPU backend)")

    guided = parser.add_argument_group("guidance (the one-stage pipeline)")
    guided.add_argument("--steps", "--num-inference-steps", type=int, metavar="N", help="denoising steps (30 or 40)")
    guided.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    for stream, other, noun in (("video", "a2v", "picture"), ("audio", "v2a", "sound")):
        cfg = [f"--{stream}-cfg-guidance-scale"] + (["--cfg-scale"] if stream == "video" else [])
        guided.add_argument(*cfg, dest=f"{stream}_cfg_scale", type=float, metavar="X", help=f"{noun}: prompt (1: off)")
        guided.add_argument(
            f"--{stream}-stg-guidance-scale",
            dest=f"{stream}_stg_scale",
            type=float,
            metavar="X",
            help=f"{noun}: perturbed self-attention (0: off)",
        )
        guided.add_argument(
            f"--{stream}-stg-blocks", type=int, nargs="+", metavar="N", help=f"{noun}: the perturbed blocks"
        )
        guided.add_argument(
            f"--{stream}-rescale-scale",
            dest=f"{stream}_rescale",
            type=float,
            metavar="X",
            help=f"{noun}: pull the contrast back, 0 to 1",
        )
        guided.add_argument(
            f"--{other}-guidance-scale",
            dest=f"{stream}_modality_scale",
            type=float,
            metavar="X",
            help=f"{noun}: follow the other modality (1: off)",
        )
        guided.add_argument(
            f"--{stream}-skip-step",
            dest=f"{stream}_skip_step",
            type=int,
            metavar="N",
            help=f"{noun}: after each guided step, skip N",
        )

    out = parser.add_argument_group("what to write")
    out.add_argument("--output", "--output-path", "-o", type=Path, metavar="FILE.mp4", help="the clip")
    out.add_argument("--output-audio", type=Path, metavar="FILE.wav", help="its sound as a file of its own (or .flac)")
    out.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="some of its frames, and its sound, at a glance"
    )
    out.add_argument("--force", action="store_true", help="overwrite files that exist")

    report = parser.add_argument_group("what to say")
    report.add_argument("--json", action="store_true", help="events as JSON lines on standard output")
    report.add_argument("--quiet", "-q", action="store_true", help="nothing but errors")
    report.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    report.add_argument("--show", type=Path, metavar="FILE.mp4", help="print the settings that made a clip, and stop")
    report.add_argument("--replay", type=Path, metavar="FILE.mp4", help="make a clip again; other flags win over it")
    report.add_argument("--version", action="version", version=f"mlx_ltx {__version__}")
    return parser


def read_request(arguments: argparse.Namespace) -> Request:
    """The request that the flags, and a clip to replay, ask for.

    Raises:
        UserError: no prompt, or a prompt or a clip that cannot be read.
    """
    given = vars(arguments)
    changes = {entry.name: given[entry.name] for entry in fields(Request) if entry.name in given}
    for name in ("video_stg_blocks", "audio_stg_blocks"):
        if name in changes:
            changes[name] = tuple(changes[name])
    if "prompt_file" in given:
        changes["prompt"] = _read_text(given["prompt_file"])
    elif changes.get("prompt") == "-":
        changes["prompt"] = sys.stdin.read().strip()
    if "replay" in given:
        from mlx_ltx.media.video import read_metadata

        settings = read_metadata(given["replay"])
        return _replayed(Request.from_settings(settings), changes)
    if "prompt" not in changes:
        raise UserError("no prompt: give --prompt TEXT, or --prompt-file FILE")
    return Request(**changes)


def _replayed(request: Request, changes: dict[str, Any]) -> Request:
    """The old request with the new flags; what a newly chosen pipeline does not use is dropped, not refused."""
    from mlx_ltx.pipelines.pipeline import pipelines

    chosen = pipelines().get(changes.get("pipeline", ""))
    if chosen is not None and chosen.name != request.pipeline:
        request = request.with_changes(width=None, height=None, **dict.fromkeys(chosen.unused))
    return request.with_changes(**changes)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None


def show(path: Path, as_json: bool) -> None:
    """Print the settings inside a clip."""
    from mlx_ltx.media.video import read_metadata

    settings = read_metadata(path)
    if as_json:
        print(json.dumps(settings, ensure_ascii=False))
        return
    width = max(map(len, settings))
    for name, value in settings.items():
        print(f"{name:<{width}}  {value}")


def dry_run(request: Request, as_json: bool) -> None:
    """Print what a request would do."""
    from mlx_ltx.pipelines.job import prepare

    if not (request.output or request.output_audio or request.contact_sheet):
        request = request.with_changes(output=Path("clip.mp4"))
    description = prepare(request).describe()
    if as_json:
        print(json.dumps(description, ensure_ascii=False))
        return
    print(f"{description['model']}, {description['pipeline']} pipeline, {description['dtype']}")
    for name in ("checkpoint", "text_encoder", "spatial_upsampler"):
        if description[name]:
            print(f"  {name.replace('_', ' ')}: {description[name]}")
    sound = f"{description['sample_rate']} Hz stereo" if description["sample_rate"] else "no sound"
    print(
        f"{description['width']}x{description['height']}, {description['num_frames']} frames "
        f"at {description['fps']:g} fps ({description['duration']:g} s), {sound}, seed {description['seed']}"
    )
    print(f"  {description['video_tokens']} video tokens, {description['audio_tokens']} audio tokens")
    for number, phase in enumerate(description["phases"], 1):
        count = f" ({phase['total']} {phase['unit']})" if phase["total"] else ""
        print(f"{number}. {phase['title']}{count}")


def generate(request: Request, screen: display.Display) -> None:
    """Run a request and show its events."""
    import mlx_ltx

    try:
        for event in mlx_ltx.stream(request):
            screen.show(event)
    finally:
        screen.close()


def run(arguments: argparse.Namespace) -> None:
    """Do what the flags say."""
    given = vars(arguments)
    as_json, quiet = given.get("json", False), given.get("quiet", False)
    if "show" in given:
        show(given["show"], as_json)
        return
    request = read_request(arguments)
    if given.get("dry_run"):
        dry_run(request, as_json)
        return
    from mlx_ltx.checkpoints.offer import with_model

    screen = display.choose(quiet, as_json)
    with_model(lambda: generate(request, screen), interactive=not (as_json or quiet))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(arguments)
    except UserError as error:
        return _fail(arguments, str(error), 1)
    except KeyboardInterrupt:
        return _fail(arguments, "stopped; nothing was written", 130)
    except Terminated:
        return _fail(arguments, "stopped; nothing was written", 143)
    except MemoryError:
        return _fail(arguments, "out of memory; make the clip smaller or shorter", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


class Terminated(BaseException):
    """SIGTERM came; unwinds like Ctrl-C."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    if vars(arguments).get("json"):
        display.JsonLines().write({"event": "Failed", "message": message, "exit_code": code})
    print(f"mlx_ltx.generate: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
