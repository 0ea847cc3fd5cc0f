#!/usr/bin/env python3
"""Compare every network and formula with recorded outputs of the reference implementation.

    python scripts/check_parity.py DIR [--only PATTERN] [--tolerance X] [--strict]

DIR holds sets of tensors: ``NAME.io.safetensors`` with inputs and the reference's outputs, ``NAME.ckpt.safetensors``
with the weights in the layout of the official checkpoints. One line is printed per output tensor. Exit code 1 if a
tensor is off, if nothing was found, or with --strict if something is not covered. Needs the runtime dependencies only.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import pkgutil
import sys
from pathlib import Path

import parity
from mlx_ltx.errors import UserError
from parity import Comparison, GoldenSet, runner_for

SUFFIX = ".io.safetensors"
TOLERANCE = 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder with the sets")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="only sets whose name matches, e.g. 'e2e_*'")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest relative L2 error (default %(default)g)",
    )
    parser.add_argument("--strict", action="store_true", help="what is not covered counts as a failure")
    return parser.parse_args()


def check_set(folder: Path, name: str, tolerance: float, counts: dict[str, int]) -> None:
    """Print a line per tensor of one set, and count them."""
    run = runner_for(name)
    if run is None:
        print(f"{name}: not covered")
        counts["not covered"] += 1
        return
    compared = 0
    try:
        for result in run(GoldenSet(folder, name)):
            if not isinstance(result, Comparison):
                print(f"{name} {result.case}: not covered")
                counts["not covered"] += 1
                continue
            compared += 1
            passed = result.error <= tolerance
            counts["passed" if passed else "failed"] += 1
            print(f"{name} {result.case} {result.tensor} {result.error:.2e} {'pass' if passed else 'FAIL'}", flush=True)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError, OSError) as error:
        print(f"{name}: FAIL ({type(error).__name__}: {error})")
        counts["failed"] += 1
        return
    if compared == 0 and counts["not covered"] == 0:
        print(f"{name}: FAIL (its runner compared nothing)")
        counts["failed"] += 1


def main() -> int:
    arguments = parse_arguments()
    for module in pkgutil.iter_modules(parity.__path__):
        importlib.import_module(f"parity.{module.name}")
    found = sorted(path.name.removesuffix(SUFFIX) for path in arguments.folder.glob(f"*{SUFFIX}"))
    names = [name for name in found if fnmatch.fnmatchcase(name, arguments.only)]
    if not names:
        print(f"check_parity: no sets ({arguments.only}{SUFFIX}) in {arguments.folder}", file=sys.stderr)
        return 1
    counts = {"passed": 0, "failed": 0, "not covered": 0}
    for name in names:
        check_set(arguments.folder, name, arguments.tolerance, counts)
    print(", ".join(f"{number} {label}" for label, number in counts.items()))
    return 1 if counts["failed"] or (arguments.strict and counts["not covered"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
