"""From what a user typed after ``--lora`` to the file on this machine; see :mod:`mlx_ltx.checkpoints.resolve`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mlx_ltx.checkpoints.catalogue import RemoteFile, similar_names
from mlx_ltx.checkpoints.hub import (
    cached_path,
    cached_snapshot,
    check_repository_name,
    format_bytes,
    list_repository,
    plan_parts,
)
from mlx_ltx.checkpoints.lora_catalogue import (
    LORAS,
    PUBLISHED_LAYERS,
    LoraEntry,
    find_lora,
    find_lora_file,
    generation_of,
)
from mlx_ltx.checkpoints.resolve import HUB_ID, MissingFiles, looks_like_a_path, safetensors_names
from mlx_ltx.errors import UserError


def resolve_lora(source: str, version: tuple[int, ...] | None = None, layers: int | None = None) -> Path:
    """The local file of a LoRA.

    Args:
        source: a name of ``lora_catalogue.LORAS``; a ``.safetensors`` file, or a folder with one in it; or
            ``owner/name`` or ``owner/name:file.safetensors`` on the hub.
        version: the checkpoint's model version; a LoRA that is published for another generation is refused. The
            published files are known by their names, wherever they lie.
        layers: the model's transformer blocks; a published LoRA that cannot fit is refused instead of downloaded.

    Raises:
        MissingFiles: it has to be downloaded first.
        UserError: there is no such LoRA, or it is for another generation or for a larger model.
    """
    if entry := find_lora(source):
        return _resolve_lora_entry(entry, source, version, layers)
    path = Path(source).expanduser()
    if path.exists():
        path = _only_file(path) if path.is_dir() else path
        if path.suffix != ".safetensors":
            raise UserError(f"--lora {source}: only .safetensors files can be loaded, not {path.suffix or 'this'}")
        if known := find_lora_file(path.name):
            _check_generation(known, source, version)
        return path
    if (match := HUB_ID.fullmatch(source)) and not looks_like_a_path(source):
        return _resolve_lora_on_hub(match["repo"], match["file"], source, version, layers)
    if looks_like_a_path(source):
        raise UserError(f"--lora {source}: there is nothing at that path")
    similar = similar_names(source, list(LORAS))
    hint = f"did you mean {' or '.join(similar)}?" if similar else "the names are those of `mlx_ltx.checkpoints list`"
    raise UserError(f"--lora {source}: no LoRA of that name, and no such file or folder; {hint}")


def loras_on_disk() -> list[LoraEntry]:
    """The catalogue's LoRAs that are in the hub cache. No network."""
    return [entry for entry in LORAS.values() if cached_path(entry.file)]


def _resolve_lora_entry(entry: LoraEntry, source: str, version: tuple[int, ...] | None, layers: int | None) -> Path:
    _check_generation(entry, source, version)
    if path := cached_path(entry.file):
        return path
    if layers not in (None, PUBLISHED_LAYERS):
        raise UserError(f"--lora {source}: is for {PUBLISHED_LAYERS} transformer blocks, but this model has {layers}")
    raise MissingFiles(plan_parts(entry.name, [entry.file]))


def _check_generation(entry: LoraEntry, source: str, version: tuple[int, ...] | None) -> None:
    if version is not None and generation_of(version) not in entry.generations:
        raise UserError(
            f"--lora {source}: is for LTX-{' and LTX-'.join(entry.generations)}, but the model is "
            f"LTX-{generation_of(version)}"
        )


def _only_file(folder: Path) -> Path:
    try:
        files = sorted(folder.glob("*.safetensors"))
    except OSError as error:
        raise UserError(f"--lora {folder}: cannot be read ({error.strerror})") from None
    if len(files) != 1:
        found = f"several files ({', '.join(file.name for file in files[:6])})" if files else "no .safetensors file"
        raise UserError(f"--lora {folder}: holds {found}; give the path of one")
    return files[0]


def _resolve_lora_on_hub(
    repo: str, name: str | None, source: str, version: tuple[int, ...] | None, layers: int | None
) -> Path:
    check_repository_name(repo)
    known = [e for e in LORAS.values() if e.file.repo.lower() == repo.lower() and name in (None, e.file.name)]
    if len(known) == 1:
        return _resolve_lora_entry(known[0], source, version, layers)
    if name is not None and (elsewhere := find_lora_file(PurePosixPath(name).name)):
        _check_generation(elsewhere, source, version)
    if name is not None and (path := cached_path(RemoteFile(repo, name, 0))):
        return path
    snapshot = cached_snapshot(repo)
    if name is None and snapshot and len(cached := safetensors_names(path.name for path in snapshot.iterdir())) == 1:
        return snapshot / cached[0]
    sizes = list_repository(repo)
    files = safetensors_names(sizes)
    if name is None and len(files) != 1:
        choices = ", ".join(f"{repo}:{file} ({format_bytes(sizes[file])})" for file in files[:6])
        found = f"several files; choose one, such as {choices}" if files else "no .safetensors file"
        raise UserError(f"--lora {source}: the repository holds {found}")
    name = name or files[0]
    if name not in sizes:
        similar = similar_names(name, files)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        raise UserError(f"--lora {source}: no such file in the repository{hint}")
    # PEFT keeps the scale of its weights in a file beside them.
    settings = str(PurePosixPath(name).with_name("adapter_config.json"))
    beside = name.endswith("adapter_model.safetensors") and settings in sizes
    wanted = [name, settings] if beside else [name]
    raise MissingFiles(plan_parts(f"{repo}:{name}", [RemoteFile(repo, file, sizes[file]) for file in wanted]))
