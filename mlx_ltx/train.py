"""``python -m mlx_ltx.train``: prepare a data set, train a LoRA or a small model; thin callers of the package."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from mlx_ltx import display
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event
from mlx_ltx.generate import Terminated

PROGRAM = "mlx_ltx.train"
PRECOMPUTE = "precompute"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The flags of training, or of preparing the data set."""
    if command == PRECOMPUTE:
        parser = argparse.ArgumentParser(
            prog=f"{PROGRAM} {PRECOMPUTE}",
            description="Encode a data set's media and captions, once. Interrupted, it goes on where it stopped.",
        )
        parser.add_argument("--strict", action="store_true", help="stop at the first file that cannot be used")
    else:
        parser = argparse.ArgumentParser(
            prog=PROGRAM,
            description="Train a LoRA or a small model, as the config says.",
            epilog=f"python -m {PROGRAM} {PRECOMPUTE} CONFIG prepares the data set first; it has a --help of its own.",
        )
        parser.add_argument("--resume", action="store_true", help="go on after the last stored step in output_dir")
        parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; the README describes it")
    parser.add_argument("--json", action="store_true", help="events as JSON lines on standard output")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")
    return parser


def run(command: str | None, arguments: argparse.Namespace) -> None:
    """Do what was asked for, and show its events."""
    from mlx_ltx.training.config import read_config
    from mlx_ltx.training.precompute import precompute
    from mlx_ltx.training.trainer import Trainer, train

    config = read_config(arguments.config)
    if command == PRECOMPUTE:
        show(precompute(config, arguments.strict), arguments)
    elif arguments.dry_run:
        described = Trainer(config).describe()
        if arguments.json:
            print(json.dumps(described))
        else:
            print("\n".join(f"{name.replace('_', ' '):<20} {value}" for name, value in described.items()))
    else:
        show(train(config, arguments.resume), arguments)


def show(events: Iterator[Event], arguments: argparse.Namespace) -> None:
    screen = display.choose(arguments.quiet, arguments.json)
    try:
        for event in events:
            screen.show(event)
    finally:
        screen.close()


def parse(argv: Sequence[str]) -> tuple[str | None, argparse.Namespace]:
    """The command, if it is not training, and the flags."""
    command = PRECOMPUTE if argv[:1] == [PRECOMPUTE] else None
    return command, build_parser(command).parse_args(argv[1:] if command else argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    command, arguments = parse(list(sys.argv[1:] if argv is None else argv))
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(command, arguments)
    except UserError as error:
        return _fail(arguments, str(error), 1)
    except (KeyboardInterrupt, Terminated) as stopped:
        again = "the same command goes on from here" if command else "--resume goes on after the last stored step"
        return _fail(arguments, f"stopped; {again}", 130 if isinstance(stopped, KeyboardInterrupt) else 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        return 1
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    if arguments.json:
        display.JsonLines().write({"event": "Failed", "message": message, "exit_code": code})
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
