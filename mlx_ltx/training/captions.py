"""What a data set consists of before anything is encoded: media files, and a caption for each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ltx.errors import UserError

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff"})
SOUNDS = frozenset({".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"})
LISTS = ("captions.json", "captions.csv")
# A column's names: the first is ours, the others are what Lightricks' trainer and common tools call it.
MEDIA_COLUMNS = ("media_path", "video_path", "video", "path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt")
REFERENCE_COLUMNS = ("reference_path", "reference", "reference_video")
REFERENCES = "references"


@dataclass(frozen=True)
class Item:
    """One sample's files.

    Attributes:
        path: the video, image or sound.
        caption: what it shows, or sounds like.
        reference: the video that an IC-LoRA is to follow.
    """

    path: Path
    caption: str
    reference: Path | None = None


def find_items(source: Path, sounds: bool = False, references: bool = False) -> list[Item]:
    """The items of a data set, in the order of their names.

    Args:
        source: a folder of media, each with a .txt of the same name beside it, or listed in the folder's captions.json
            or captions.csv; or such a list itself. A list has the columns media_path and caption, and reference_path;
            JSON holds a list of objects, or an object of captions by path. Paths are relative to the list.
        sounds: sounds are wanted (videos have them too) instead of pictures.
        references: every item needs a reference: from the list, or of the same name in the folder ``references``.

    Raises:
        UserError: there is nothing, or something has no caption or no reference.
    """
    if not source.exists():
        raise UserError(f"data.dataset: {source} does not exist")
    if source.is_dir():
        listed = next((source / name for name in LISTS if (source / name).is_file()), None)
    else:
        listed = source
    rows = _read_list(listed) if listed is not None else _read_folder(source, sounds)
    if not rows:
        kinds = "videos or sounds" if sounds else "videos or images"
        raise UserError(f"data.dataset: {source} holds no {kinds}")
    absent = [path for path, _, _ in rows if not path.is_file()]
    if absent:
        raise UserError(f"{listed}: {len(absent)} of {len(rows)} files do not exist ({_some(absent)})")
    silent = [path for path, caption, _ in rows if not caption]
    if silent:
        raise UserError(
            f"data.dataset: {len(silent)} of {len(rows)} files have no caption ({_some(silent)}); put a .txt of the "
            f"same name beside each, or list them in {LISTS[0]}"
        )
    folder = source if source.is_dir() else source.parent
    items = [
        Item(path, caption, (given or _beside(path, folder)) if references else None) for path, caption, given in rows
    ]
    alone = [item.path for item in items if references and (item.reference is None or not item.reference.is_file())]
    if alone:
        raise UserError(
            f"data.dataset: {len(alone)} of {len(items)} files have no reference video ({_some(alone)}); give "
            f"reference_path in the list, or a file of the same name in {folder / REFERENCES}"
        )
    return items


Row = tuple[Path, str, Path | None]


def _read_folder(folder: Path, sounds: bool) -> list[Row]:
    wanted = VIDEOS | (SOUNDS if sounds else IMAGES)
    rows: list[Row] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in wanted and not path.name.startswith("."):
            beside = path.with_suffix(".txt")
            rows.append((path, _read_text(beside).strip() if beside.is_file() else "", None))
    return rows


def _read_list(path: Path) -> list[Row]:
    if path.suffix.lower() == ".csv":
        entries: Iterable[Any] = csv.DictReader(_read_text(path).splitlines())
    elif path.suffix.lower() == ".json":
        try:
            entries = json.loads(_read_text(path))
        except ValueError:
            raise UserError(f"{path}: is not JSON") from None
        if isinstance(entries, Mapping):
            entries = [{MEDIA_COLUMNS[0]: name, CAPTION_COLUMNS[0]: caption} for name, caption in entries.items()]
    else:
        raise UserError(f"data.dataset: {path} is neither a folder nor a .json or .csv list")
    rows: list[Row] = []
    for number, entry in enumerate(entries if isinstance(entries, Iterable) else [entries], 1):
        media = _column(entry, MEDIA_COLUMNS)
        if media is None:
            raise UserError(f"{path}: entry {number} has no {MEDIA_COLUMNS[0]}")
        reference = _column(entry, REFERENCE_COLUMNS)
        caption = _column(entry, CAPTION_COLUMNS) or ""
        rows.append((path.parent / media, caption, path.parent / reference if reference else None))
    return rows


def _column(entry: Any, names: Iterable[str]) -> str | None:
    """The text in the first of these columns that there is."""
    if not isinstance(entry, Mapping):
        return None
    found = next((entry[name] for name in names if entry.get(name)), None)
    return str(found).strip() if found is not None else None


def _beside(path: Path, folder: Path) -> Path | None:
    return next((each for each in sorted((folder / REFERENCES).glob(f"{path.stem}.*"))), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None


def _some(paths: list[Path], limit: int = 3) -> str:
    return ", ".join(path.name for path in paths[:limit]) + (", …" if len(paths) > limit else "")
