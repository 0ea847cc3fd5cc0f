"""``python -m mlx_ltx.checkpoints``: the known models, getting them, and saving them quantised."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlx_ltx.checkpoints.catalogue import MODELS, TEXT_ENCODERS, find_model, similar_names
from mlx_ltx.checkpoints.hub import DownloadPlan, Part, format_bytes, model_parts, plan_download, plan_parts
from mlx_ltx.checkpoints.lora_catalogue import LORAS, find_lora
from mlx_ltx.checkpoints.lora_resolve import loras_on_disk
from mlx_ltx.checkpoints.offer import show_download
from mlx_ltx.checkpoints.packs import PackProgress, open_checkpoint, write_pack
from mlx_ltx.checkpoints.quantize import SETTINGS, Quantization
from mlx_ltx.checkpoints.resolve import models_on_disk, resolve_checkpoint
from mlx_ltx.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_ltx.checkpoints", description="The models that are known by name.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, and what is on this machine")
    get = commands.add_parser("download", help="fetch a model into the Hugging Face cache; resumes where it stopped")
    get.add_argument("name", metavar="NAME", help="a model or a LoRA of the list")
    get.add_argument("--text-encoder", choices=TEXT_ENCODERS, help="another build of Gemma 3 than the model's own")
    get.add_argument("--dry-run", action="store_true", help="say what would be fetched, and stop")
    get.add_argument("--json", action="store_true", help="progress as JSON lines on standard output")
    pack = commands.add_parser("quantize", help="save a model with its transformer in fewer bits")
    pack.add_argument("source", metavar="SRC", help="a checkpoint file, its folder, or a downloaded model of the list")
    pack.add_argument("destination", metavar="DST", help="the folder to make, which --model then takes")
    pack.add_argument("--quantize", required=True, metavar="NAME", help=", ".join(SETTINGS))
    pack.add_argument("--group-size", type=int, metavar="N", help="numbers that share a scale, for q8 to q4 (64)")
    return parser


def list_models() -> None:
    """A line per model, then the text encoders to choose from, then the LoRAs."""
    on_disk = {entry.name for entry in models_on_disk()}
    for entry in MODELS.values():
        approximate = any(part.approximate for part in model_parts(entry))
        size = ("~" if approximate else "") + format_bytes(sum(part.nbytes for part in model_parts(entry)))
        size = "embedded" if entry.embedded else size
        here = " (on this machine)" if entry.name in on_disk else ""
        print(
            f"{entry.name:<20} {size:>10}  {entry.title}; {' and '.join(entry.pipelines)}; {entry.licence.name}{here}"
        )
    print("\ntext encoders (download NAME --text-encoder ...):")
    for encoder in TEXT_ENCODERS.values():
        print(f"{encoder.name:<20} {'~' + format_bytes(encoder.nbytes):>10}  {encoder.title}")
    print("\nLoRAs (--lora NAME, or --camera for a camera move):")
    loras_here = {entry.name for entry in loras_on_disk()}
    for lora in LORAS.values():
        size = ("~" if lora.file.approximate else "") + format_bytes(lora.file.nbytes)
        here = " (on this machine)" if lora.name in loras_here else ""
        print(f"{lora.name:<28} {size:>8}  {lora.title}; for LTX-{' and LTX-'.join(lora.generations)}{here}")


def get_model(name: str, text_encoder: str | None, dry_run: bool, as_json: bool) -> None:
    """Fetch a model or a LoRA by its name."""
    entry = find_model(name)
    if entry is None and (lora := find_lora(name)):
        if text_encoder:
            raise UserError(f"--text-encoder: {lora.name} is a LoRA, which has none")
        fetch(plan_parts(lora.name, [lora.file]), dry_run, as_json)
        return
    if entry is None:
        similar = similar_names(name, [*MODELS, *LORAS])
        known = f"did you mean {' or '.join(similar)}?" if similar else f"the names are {', '.join(MODELS)}"
        raise UserError(f"{name}: no model or LoRA of that name; {known}")
    if entry.embedded:
        raise UserError(f"{entry.name} comes with the package; there is nothing to download")
    parts: list[Part] = [
        TEXT_ENCODERS[text_encoder] if text_encoder and part is entry.text_encoder else part
        for part in model_parts(entry)
    ]
    fetch(plan_download(entry, parts), dry_run, as_json)


def fetch(plan: DownloadPlan, dry_run: bool, as_json: bool) -> None:
    """Say what is fetched, and fetch it unless it is a dry run."""
    print(plan.summary(), file=sys.stderr)
    if not dry_run:
        show_download(plan, as_json)


def save_pack(source: str, destination: str, name: str, group_size: int | None) -> None:
    """Write a pack, with a line on standard error at every twentieth of it."""
    setting = Quantization.parse(name, group_size)
    checkpoint = open_checkpoint(resolve_checkpoint(source))
    reported = 0
    last: PackProgress | None = None
    for last in write_pack(checkpoint, destination, setting):
        if (part := 20 * last.done // last.total) > reported:
            reported = part
            print(
                f"{format_bytes(last.done)} of {format_bytes(last.total)}, shard {last.shard} of {last.shards}",
                file=sys.stderr,
            )
    assert last is not None
    print(f"{destination}: {format_bytes(last.total)}, {setting.name}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "list":
            list_models()
        elif arguments.command == "quantize":
            save_pack(arguments.source, arguments.destination, arguments.quantize, arguments.group_size)
        else:
            get_model(arguments.name, arguments.text_encoder, arguments.dry_run, arguments.json)
    except UserError as error:
        print(f"mlx_ltx.checkpoints: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "nothing was kept" if arguments.command == "quantize" else "the next download goes on from here"
        print(f"mlx_ltx.checkpoints: stopped; {kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
