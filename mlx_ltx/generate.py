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
from mlx_ltx.flags import build_parser, capabilities
from mlx_ltx.request import SOUND_GUIDANCE, Request


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
    if len(seeds := changes.pop("seed", ())) == 1:
        changes["seed"] = seeds[0]
    elif seeds:
        changes["seeds"] = tuple(seeds)
    if "prompt_file" in given:
        changes["prompt"] = _read_text("--prompt-file", given["prompt_file"]).strip()
    elif "prompts_file" in given:
        lines = _read_text("--prompts-file", given["prompts_file"]).splitlines()
        changes["prompts"] = tuple(line.strip() for line in lines if line.strip())
        if not changes["prompts"]:
            raise UserError(f"--prompts-file {given['prompts_file']}: holds no prompt")
    elif changes.get("prompt") == "-":
        changes["prompt"] = sys.stdin.read().strip()
    if not changes.get("prompt", "-") and given.get("prompt") != "":
        source = f"--prompt-file {given['prompt_file']}" if "prompt_file" in given else "--prompt -: standard input"
        raise UserError(f"{source} holds no prompt")
    if "replay" in given:
        from mlx_ltx.media.video import read_metadata

        settings = read_metadata(given["replay"])
        return _replayed(Request.from_settings(settings), changes)
    if not {"prompt", "prompts", "segments"} & changes.keys() and _wants_prompt(changes.get("pipeline")):
        raise UserError("no prompt: give --prompt TEXT, or --prompt-file FILE")
    return Request(**changes)


def _wants_prompt(pipeline: str | None) -> bool:
    from mlx_ltx.pipelines.pipeline import pipelines

    chosen = pipelines().get(pipeline or "")
    return chosen is None or "prompt" in chosen.takes


def _replayed(request: Request, changes: dict[str, Any]) -> Request:
    """The old request with the new flags; what a newly chosen pipeline does not use is dropped, not refused."""
    from mlx_ltx.pipelines.pipeline import pipelines

    chosen = pipelines().get(changes.get("pipeline", ""))
    if chosen is not None and chosen.name != request.pipeline:
        dropped = [entry for entry in fields(Request) if entry.name not in chosen.accepts]
        defaults = {entry.name: entry.default for entry in dropped}
        request = request.with_changes(**{**defaults, "width": None, "height": None})
    if changes.get("audio") is False:
        request = request.with_changes(**dict.fromkeys(SOUND_GUIDANCE))
    for name, several in (("seed", "seeds"), ("prompt", "prompts"), ("prompt", "segments")):
        if name in changes:
            changes.setdefault(several, ())
    if "prompts" in changes or "segments" in changes:
        changes.setdefault("prompt", "")
    if "prompt" in changes:
        changes.setdefault("original_prompt", None)
    elif changes.get("enhance_prompt") and request.original_prompt:
        changes["prompt"] = request.original_prompt  # not what was made of it
    return request.with_changes(**changes)


def _read_text(flag: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None


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


def dry_run(request: Request, as_json: bool, memory: int | None = None) -> None:
    """Print what a request would do, and what it would take of a machine with so much memory (None: this one).

    A model that is not here yet is described by what there is to download.
    """
    from mlx_ltx.checkpoints.offer import commands
    from mlx_ltx.checkpoints.resolve import MissingFiles
    from mlx_ltx.pipelines.job import prepare
    from mlx_ltx.pipelines.predict import make_fit

    try:
        job = prepare(_with_output(request))
    except MissingFiles as missing:
        if as_json:
            print(json.dumps({"download": missing.plan.to_json()}, ensure_ascii=False))
        else:
            print(missing.plan.summary())
            print(commands(missing.plan))
        return
    job, plan, choices = make_fit(job, memory)
    description = {**job.describe(), "plan": {**plan.to_json(), "choices": choices}}
    if as_json:
        print(json.dumps(description, ensure_ascii=False))
        return
    print(f"{description['model']}, {description['pipeline']} pipeline, {description['dtype']}")
    for name in ("checkpoint", "text_encoder", "spatial_upsampler"):
        if description[name]:
            print(f"  {name.replace('_', ' ')}: {description[name]}")
    sound = f"{description['sample_rate']} Hz stereo" if description["sample_rate"] else "no sound"
    picture = "no picture"
    if description["video_tokens"]:
        frames = f"{description['num_frames']} frames at {description['fps']:g} fps"
        picture = f"{description['width']}x{description['height']}, {frames}"
    print(
        f"{picture} ({description['duration']:g} s), {sound}, "
        f"seed {', '.join(map(str, dict.fromkeys(description['seeds'])))}"
    )
    print(f"  {description['video_tokens']} video tokens, {description['audio_tokens']} audio tokens")
    for number, phase in enumerate(description["phases"], 1):
        count = f" ({phase['total']} {phase['unit']})" if phase["total"] else ""
        print(f"{number}. {phase['title']}{count}")
    print(*plan.table(), sep="\n")
    if choices:
        print(f"chosen to fit: {choices}")
    if not plan.fits:
        print(f"does not fit: {plan.complaint}")


def _with_output(request: Request) -> Request:
    """A request for something, for what writes nothing."""
    from mlx_ltx.pipelines.pipeline import pipelines

    if request.outputs:
        return request
    pipeline = pipelines().get(request.pipeline or "")
    if pipeline is None or pipeline.makes_picture:
        return request.with_changes(output=Path("clip.mp4"), force=True)
    return request.with_changes(output_audio=Path("sound.wav"), force=True)


def _assumed_memory(given: dict[str, Any]) -> int | None:
    from mlx_ltx.memory.plan import parse_size

    return parse_size(given["assume_memory"]) if "assume_memory" in given else None


def generate(request: Request, screen: display.Display) -> None:
    """Run a request and show its events."""
    import mlx_ltx

    try:
        for event in mlx_ltx.stream(request):
            screen.show(event)
    finally:
        screen.close()


def enhance_only(request: Request, screen: display.Display) -> None:
    """Rewrite the prompt of a request, show it, and write nothing."""
    from mlx_ltx.pipelines.enhance import enhance_only
    from mlx_ltx.pipelines.job import prepare

    request = _with_output(request).with_changes(enhance_prompt=True)
    try:
        for event in enhance_only(prepare(request)):
            screen.show(event)
    finally:
        screen.close()


def run(arguments: argparse.Namespace) -> None:
    """Do what the flags say."""
    given = vars(arguments)
    as_json, quiet = given.get("json", False), given.get("quiet", False)
    if "capabilities" in given:
        print(json.dumps(capabilities(build_parser()), ensure_ascii=False))
        return
    if "show" in given:
        show(given["show"], as_json)
        return
    request = read_request(arguments)
    if given.get("dry_run"):
        dry_run(request, as_json, _assumed_memory(given))
        return
    if "assume_memory" in given:
        raise UserError("--assume-memory goes with --dry-run")
    from mlx_ltx.checkpoints.offer import with_model

    if given.get("enhance_only"):
        action, screen = enhance_only, display.choose(quiet, as_json, text=sys.stdout)
    else:
        action, screen = generate, display.choose(quiet, as_json)
    with_model(lambda: action(request, screen), interactive=not (as_json or quiet))


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
