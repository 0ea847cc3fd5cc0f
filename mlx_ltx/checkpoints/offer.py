"""Downloads for people: what would be fetched, the question whether to, and a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from tqdm import tqdm

from mlx_ltx.checkpoints.catalogue import MODELS, RemoteFile
from mlx_ltx.checkpoints.hub import DownloadPlan, download
from mlx_ltx.checkpoints.lora_catalogue import LORAS
from mlx_ltx.checkpoints.resolve import MissingFiles
from mlx_ltx.errors import UserError

T = TypeVar("T")


def with_model(action: Callable[[], T], interactive: bool) -> T:
    """Do ``action``; if its model is not on this machine, offer to download it and do it again.

    Args:
        action: raises :class:`MissingFiles` before it does anything if files are missing.
        interactive: whether somebody may be asked; a question also needs a terminal.

    Raises:
        UserError: nobody can be asked, or the answer was no; the message says which commands there are.
    """
    try:
        return action()
    except MissingFiles as missing:
        if not (interactive and sys.stdin.isatty() and sys.stderr.isatty()):
            raise UserError(f"{missing}; {commands(missing.plan)}") from None
        print(missing.plan.summary(), file=sys.stderr)
        print("Download? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError(f"nothing was downloaded; {commands(missing.plan)}") from None
        show_download(missing.plan)
        return action()


def commands(plan: DownloadPlan) -> str:
    """The ways on, as commands."""
    if plan.title in LORAS:
        return f"get it with `python -m mlx_ltx.checkpoints download {plan.title}`"
    files = [part for part in plan.parts if isinstance(part, RemoteFile)]
    if plan.title not in MODELS and len(files) == len(plan.parts):
        # Files that the catalogue does not know: the hub's own tool puts them into the same cache.
        return "get it with " + " and ".join(f"`hf download {file.repo} {file.name}`" for file in files)
    name = plan.title if plan.title in MODELS else next(iter(MODELS))
    return f"get it with `python -m mlx_ltx.checkpoints download {name}`, or try the tiny one with `--model demo`"


def show_download(plan: DownloadPlan, as_json: bool = False) -> None:
    """Download with a bar on standard error, or with JSON lines on standard output."""
    if as_json:
        for event in download(plan):
            print(json.dumps({"event": "Download", **asdict(event)}), flush=True)
        return
    with tqdm(total=plan.remaining_bytes, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for event in download(plan):
            bar.total = event.total
            bar.set_description(f"checking {event.file}" if event.checking else event.file, refresh=False)
            bar.update(event.done - bar.n)
