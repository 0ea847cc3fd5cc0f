"""From what a user typed after ``--model`` to the files on this machine.

A model is given as a name of the catalogue, a checkpoint file, a folder, or a repository on the hub; local paths win
over the hub. Nothing is downloaded here: what is missing is raised as :class:`MissingFiles`, with the plan that
``hub.download`` carries out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mlx_ltx.checkpoints.catalogue import (
    DEFAULT_TEXT_ENCODER,
    MODELS,
    TEXT_ENCODERS,
    ModelEntry,
    RemoteFile,
    TextEncoderEntry,
    demo_folder,
    find_checkpoint,
    find_model,
    is_distilled,
    model_names,
    similar_names,
)
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.hub import (
    DownloadPlan,
    Part,
    cached_path,
    cached_snapshot,
    cached_text_encoder,
    check_repository_name,
    format_bytes,
    list_repository,
    page_licence,
    plan_download,
    plan_parts,
)
from mlx_ltx.checkpoints.packs import Pack, is_pack_folder
from mlx_ltx.checkpoints.recognise import (
    SHARD,
    is_checkpoint,
    is_gemma_folder,
    is_spatial_upsampler,
    metadata_config,
    missing_gemma_files,
    what_else,
)
from mlx_ltx.errors import UserError
from mlx_ltx.memory.machine import total_memory

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[\w./-]+\.safetensors))?")
GEMMA_12B_WIDTH = 3840
# Beside the weights on a Mac stand the activations, the VAE's frames and the rest of the system; macOS lets the GPU
# hold about three quarters of the memory.
USABLE_FRACTION = 0.75
HEADROOM_BYTES = 4_000_000_000


class MissingFiles(UserError):
    """What the user asked for is known but not (wholly) on this machine; ``plan`` says what is to be downloaded.

    ``unasked`` is set if no model was named, and the plan is only what we would propose.
    """

    def __init__(self, plan: DownloadPlan, unasked: bool = False):
        self.plan = plan
        if unasked:
            super().__init__(f"no model on this machine yet; {plan.title} is {plan.size} to download")
            return
        missing = [part for part, cached in zip(plan.parts, plan.cached, strict=True) if not cached]
        names = ", ".join(part.name if isinstance(part, RemoteFile) else part.repo for part in missing)
        hint = " (or pass yours with --text-encoder)" if any(isinstance(p, TextEncoderEntry) for p in missing) else ""
        super().__init__(f"{plan.title}: not on this machine yet: {names}{hint}; {plan.size} to download")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model on this machine.

    Attributes:
        name: the catalogue's name, or the checkpoint's file name without its suffix.
        checkpoint: the single-file checkpoint, or the folder of a saved pack.
        text_encoder: the Gemma folder.
        spatial_upsampler: the latent upsampler, if there is one.
        entry: the catalogue entry, if the model is known by name.
        origin: the name of the file that a pack was made from, if it says it.
    """

    name: str
    checkpoint: Path
    text_encoder: Path
    spatial_upsampler: Path | None = None
    entry: ModelEntry | None = None
    origin: str | None = None

    @property
    def distilled(self) -> bool:
        """Whether the distilled pipeline is the default; see :func:`catalogue.is_distilled`."""
        return is_distilled(self.entry or self.origin or self.checkpoint)


def resolve_model(
    spec: str | None = None, text_encoder: str | None = None, spatial_upsampler: str | None = None
) -> ModelFiles:
    """The local files of the model ``spec``.

    Args:
        spec: a catalogue name or alias; a ``.safetensors`` checkpoint; a folder with one in it or in a sub-folder, or
            with a saved pack; or ``owner/name`` or ``owner/name:file.safetensors`` on the hub. None takes the best
            model on this machine (:func:`best_model_on_disk`), never the embedded demo.
        text_encoder: the value of ``--text-encoder``: a Gemma folder, a name of ``TEXT_ENCODERS``, or ``owner/name``
            on the hub. None takes the Gemma folder beside the checkpoint, or else the catalogue's Gemma 3 12B.
        spatial_upsampler: the value of ``--spatial-upsampler``, a file. None takes the catalogue's, or the one beside
            the checkpoint.

    Raises:
        MissingFiles: parts have to be downloaded first.
        UserError: there is no such model, or it is not one that can run.
    """
    chosen_upsampler = None if spatial_upsampler is None else _upsampler_path(spatial_upsampler)
    if spec is None:
        entry = best_model_on_disk(total_memory()) or _nothing_chosen()
        return _resolve_entry(entry, text_encoder, chosen_upsampler)
    if entry_named := find_model(spec):
        return _resolve_entry(entry_named, text_encoder, chosen_upsampler)
    path = Path(spec).expanduser()
    if path.exists():
        return _resolve_path(path, text_encoder, chosen_upsampler)
    if (match := HUB_ID.fullmatch(spec)) and not looks_like_a_path(spec):
        return _resolve_hub(match["repo"], match["file"], text_encoder, chosen_upsampler)
    if looks_like_a_path(spec):
        raise UserError(f"--model {spec}: there is nothing at that path")
    similar = similar_names(spec, model_names())
    known = f"did you mean {' or '.join(similar)}?" if similar else f"the names are {', '.join(MODELS)}"
    raise UserError(f"--model {spec}: no model of that name, and no such file or folder; {known}")


def resolve_checkpoint(spec: str) -> Path:
    """The local checkpoint file or pack that ``spec`` names, by itself: no text encoder, no upsampler.

    Args:
        spec: a catalogue name or alias, a file, or a folder with one checkpoint in it or in a sub-folder.

    Raises:
        MissingFiles: it is in the catalogue, but has to be downloaded first.
        UserError: there is no such checkpoint.
    """
    if entry := find_model(spec):
        if entry.checkpoint is None:
            return _checkpoint_in(demo_folder()).path
        if cached := cached_path(entry.checkpoint):
            return cached
        raise MissingFiles(plan_parts(entry.name, [entry.checkpoint]))
    path = Path(spec).expanduser()
    if path.is_dir():
        return _checkpoint_in(path).path
    if not path.exists():
        raise UserError(f"{spec}: there is no such file or folder, and no model of that name")
    return path


def models_on_disk() -> list[ModelEntry]:
    """The catalogue's published models that are wholly in the hub cache, the preferred one first. No network."""
    return [entry for entry in MODELS.values() if not entry.embedded and not _missing(entry)]


def fits(entry: ModelEntry, memory_bytes: int) -> bool:
    """Whether the bf16 transformer and some gigabytes of headroom fit three quarters of the memory.

    The rule only ranks models. One that does not fit may still run, quantised or streamed: the memory plan decides.
    """
    return entry.transformer_nbytes + HEADROOM_BYTES <= USABLE_FRACTION * memory_bytes


def best_model_on_disk(memory_bytes: int) -> ModelEntry | None:
    """The first model of the catalogue that is wholly in the hub cache and fits ``memory_bytes``, or None."""
    return next((entry for entry in models_on_disk() if fits(entry, memory_bytes)), None)


def _nothing_chosen() -> NoReturn:
    """No model was named, and none that is here fits: say what could be done."""
    on_disk = models_on_disk()
    if on_disk:
        raise UserError(
            f"no --model given, and {on_disk[0].name} does not fit the {format_bytes(total_memory())} of this machine; "
            f"try it all the same with --model {on_disk[0].name}"
        )
    raise MissingFiles(plan_download(next(iter(MODELS.values()))), unasked=True)


def _missing(entry: ModelEntry) -> bool:
    files = [file for file in (entry.checkpoint, entry.spatial_upsampler) if file]
    return not all(map(cached_path, files)) or _cached_gemma(entry.text_encoder) is None


def _cached_gemma(preferred: TextEncoderEntry | None) -> Path | None:
    """The preferred Gemma of the catalogue if it is on this machine, else any other of the catalogue that is."""
    for entry in dict.fromkeys((preferred or DEFAULT_TEXT_ENCODER, *TEXT_ENCODERS.values())):
        if folder := cached_text_encoder(entry):
            return folder
    return None


def _resolve_entry(entry: ModelEntry, text_encoder: str | None, upsampler: Path | None) -> ModelFiles:
    if entry.checkpoint is None:
        found = _resolve_folder(demo_folder(), text_encoder, upsampler)
        return ModelFiles(entry.name, found.checkpoint, found.text_encoder, found.spatial_upsampler, entry)
    gemma = _text_encoder(text_encoder, entry.text_encoder)
    published_upsampler = None if upsampler else entry.spatial_upsampler
    parts: list[Part] = [entry.checkpoint]
    parts += [published_upsampler] if published_upsampler else []
    parts += [] if isinstance(gemma, Path) else [gemma]
    return _local_files(entry.name, entry.checkpoint, published_upsampler, upsampler, gemma, parts, entry)


def _local_files(
    name: str,
    checkpoint: RemoteFile,
    published_upsampler: RemoteFile | None,
    upsampler: Path | None,
    gemma: Path | TextEncoderEntry,
    parts: list[Part],
    entry: ModelEntry | None,
) -> ModelFiles:
    """The cached files of a hub model, or MissingFiles if any of ``parts`` is not cached."""
    plan = plan_parts(name, parts)
    checkpoint_path = cached_path(checkpoint)
    if published_upsampler:
        upsampler = cached_path(published_upsampler)
    if checkpoint_path is None or not isinstance(gemma, Path) or not all(plan.cached):
        raise MissingFiles(plan)
    return ModelFiles(name, checkpoint_path, gemma, upsampler, entry)


def _resolve_path(path: Path, text_encoder: str | None, upsampler: Path | None) -> ModelFiles:
    if path.is_dir():
        return _resolve_folder(path, text_encoder, upsampler)
    if path.suffix != ".safetensors":
        raise UserError(f"--model {path}: only .safetensors checkpoints can be loaded, not {path.suffix or 'this'}")
    if is_pack_folder(path.absolute().parent) and SHARD.fullmatch(path.name):
        raise UserError(f"--model {path}: is one shard of a pack; give its folder")
    file = SafetensorsFile(path)
    if other := what_else(file):
        raise UserError(f"--model {path}: not an LTX-2 checkpoint; it looks like {other}")
    return _beside(file, path.absolute().parent, text_encoder, upsampler)


def _resolve_folder(folder: Path, text_encoder: str | None, upsampler: Path | None) -> ModelFiles:
    return _beside(_checkpoint_in(folder), folder, text_encoder, upsampler)


def _checkpoint_in(folder: Path) -> SafetensorsFile:
    """The only checkpoint or pack in ``folder`` or one of its sub-folders."""
    files, damaged = _open_all(folder)
    packs: list[SafetensorsFile] = [Pack(place) for place in _places(folder) if is_pack_folder(place)]
    checkpoints = packs + [file for file in files if is_checkpoint(file)]
    if len(checkpoints) > 1:
        names = ", ".join(sorted(str(file.path.relative_to(folder)) for file in checkpoints))
        raise UserError(f"--model {folder}: holds several checkpoints ({names}); give the path of one")
    if checkpoints:
        return checkpoints[0]
    if damaged:
        raise damaged[0]
    if is_gemma_folder(folder):
        raise UserError(f"--model {folder}: is a Gemma text encoder; pass it with --text-encoder")
    largest = max(files, key=lambda file: sum(info.nbytes for info in file.tensors.values()), default=None)
    what = f"; {largest.path.name} looks like {what_else(largest)}" if largest else ""
    raise UserError(f"--model {folder}: holds no LTX-2 checkpoint{what}")


def _open_all(folder: Path) -> tuple[list[SafetensorsFile], list[UserError]]:
    """Every safetensors file in ``folder`` and its sub-folders, except Gemma's and the shards of packs, and the errors
    of damaged ones.
    """
    files, damaged = [], []
    for place in _places(folder):
        if not is_gemma_folder(place):
            pack = is_pack_folder(place)
            for path in sorted(place.glob("*.safetensors")):
                if pack and SHARD.fullmatch(path.name):
                    continue
                try:
                    files.append(SafetensorsFile(path))
                except UserError as error:
                    damaged.append(error)
    return files, damaged


def _places(folder: Path) -> list[Path]:
    """``folder`` and its sub-folders, one level deep."""
    try:
        return [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def _beside(checkpoint: SafetensorsFile, folder: Path, text_encoder: str | None, upsampler: Path | None) -> ModelFiles:
    """A local checkpoint together with the Gemma folder and the upsampler that lie with it."""
    pack = checkpoint if isinstance(checkpoint, Pack) else None
    name = checkpoint.path.absolute().name if pack else checkpoint.path.stem
    gemma = _gemma_beside(checkpoint, folder, text_encoder)
    if not isinstance(gemma, Path):
        raise MissingFiles(plan_parts(name, [gemma]))
    upsampler = upsampler or _upsampler_beside(folder) or (_upsampler_of_origin(pack) if pack else None)
    return ModelFiles(name, checkpoint.path, gemma, upsampler, origin=pack.origin if pack else None)


def _gemma_beside(checkpoint: SafetensorsFile, folder: Path, text_encoder: str | None) -> Path | TextEncoderEntry:
    if text_encoder is None:
        folders = [place for place in _places(folder) if is_gemma_folder(place)]
        if len(folders) > 1:
            names = ", ".join(place.name for place in folders)
            raise UserError(f"{folder}: holds several Gemma folders ({names}); choose one with --text-encoder")
        if folders:
            return _complete_gemma(folders[0])
        # The catalogue's Gemma is the 12B one: do not offer it to a checkpoint of another width.
        width = metadata_config(checkpoint).get("transformer", {}).get("caption_channels", GEMMA_12B_WIDTH)
        if width != GEMMA_12B_WIDTH:
            raise UserError(f"{checkpoint.path}: there is no Gemma folder with it; pass one with --text-encoder")
    return _text_encoder(text_encoder, None)


def _upsampler_beside(folder: Path) -> Path | None:
    """The spatial upsampler in ``folder`` or below: the only one, or the only one that doubles."""
    found = [file for file in _open_all(folder)[0] if is_spatial_upsampler(file)]
    doubling = [file for file in found if float(metadata_config(file).get("spatial_scale", 2.0)) == 2.0]
    candidates = doubling or found
    if len(candidates) > 1:
        names = ", ".join(file.path.name for file in candidates)
        raise UserError(f"{folder}: holds several spatial upsamplers ({names}); choose one with --spatial-upsampler")
    return candidates[0].path if candidates else None


def _upsampler_of_origin(pack: Pack) -> Path | None:
    """The catalogue's upsampler for the published checkpoint that a pack was made from, if it is on this machine."""
    for entry in MODELS.values():
        if entry.checkpoint and entry.spatial_upsampler and entry.checkpoint.name == pack.origin:
            return cached_path(entry.spatial_upsampler)
    return None


def _upsampler_path(value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise UserError(f"--spatial-upsampler {value}: there is no such file")
    file = SafetensorsFile(path)
    if not is_spatial_upsampler(file):
        raise UserError(f"--spatial-upsampler {value}: not a spatial latent upsampler; it looks like {what_else(file)}")
    return path


def _text_encoder(value: str | None, preferred: TextEncoderEntry | None) -> Path | TextEncoderEntry:
    """The Gemma folder that ``value`` names, or the hub entry that has to be downloaded to have it."""
    if value is None:
        return _cached_gemma(preferred) or preferred or DEFAULT_TEXT_ENCODER
    if entry := TEXT_ENCODERS.get(value.strip().lower()):
        return cached_text_encoder(entry) or entry
    path = Path(value).expanduser()
    if path.is_dir():
        folders = [place for place in _places(path) if is_gemma_folder(place)]
        if len(folders) != 1:
            found = f"several Gemma folders ({', '.join(p.name for p in folders)})" if folders else "no Gemma 3 model"
            raise UserError(f"--text-encoder {value}: holds {found}; give a folder with Gemma's config.json")
        return _complete_gemma(folders[0])
    if path.exists():
        raise UserError(f"--text-encoder {value}: is a file; give the folder that holds Gemma's config.json")
    if HUB_ID.fullmatch(value) and ":" not in value and not looks_like_a_path(value):
        return _text_encoder_on_hub(value)
    similar = similar_names(value, list(TEXT_ENCODERS))
    known = f"did you mean {' or '.join(similar)}?" if similar else f"the names are {', '.join(TEXT_ENCODERS)}"
    raise UserError(f"--text-encoder {value}: no such folder, and no text encoder of that name; {known}")


def _text_encoder_on_hub(repo: str) -> Path | TextEncoderEntry:
    check_repository_name(repo)
    for known in TEXT_ENCODERS.values():
        if known.repo.lower() == repo.lower():
            return cached_text_encoder(known) or known
    entry = TextEncoderEntry(repo, repo, 0, repo, page_licence(repo), approximate=False)
    if folder := cached_text_encoder(entry):
        if not is_gemma_folder(folder):
            raise UserError(f"--text-encoder {repo}: is not a Gemma 3 model")
        return folder
    sizes = {name: size for name, size in list_repository(repo).items() if entry.selects(name)}
    if "config.json" not in sizes or not safetensors_names(sizes):
        raise UserError(f"--text-encoder {repo}: the repository holds no Gemma 3 model in safetensors")
    nbytes = sum(sizes.values())
    return TextEncoderEntry(repo, repo, nbytes, repo, entry.licence, approximate=False)


def _complete_gemma(folder: Path) -> Path:
    if missing := missing_gemma_files(folder):
        raise UserError(f"{folder}: this Gemma folder is incomplete, it lacks {', '.join(missing[:3])}")
    return folder


def _resolve_hub(repo: str, name: str | None, text_encoder: str | None, upsampler: Path | None) -> ModelFiles:
    check_repository_name(repo)
    if name is None:
        snapshot = cached_snapshot(repo)
        if snapshot and (is_pack_folder(snapshot) or any(is_checkpoint(file) for file in _open_all(snapshot)[0])):
            return _resolve_folder(snapshot, text_encoder, upsampler)
        checkpoint = _only_checkpoint(repo)
    else:
        checkpoint = RemoteFile(repo, name, 0)
    if entry := find_checkpoint(checkpoint.repo, checkpoint.name):
        return _resolve_entry(entry, text_encoder, upsampler)
    if local := cached_path(checkpoint):
        file = SafetensorsFile(local)
        if other := what_else(file):
            raise UserError(f"--model {repo}:{checkpoint.name}: not an LTX-2 checkpoint; it looks like {other}")
        snapshot = local.parents[checkpoint.name.count("/")]
        return _beside(file, snapshot, text_encoder, upsampler)
    if name is not None:
        sizes = list_repository(repo)
        if name not in sizes:
            similar = similar_names(name, safetensors_names(sizes))
            hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise UserError(f"--model {repo}:{name}: no such file in the repository{hint}")
        checkpoint = RemoteFile(repo, name, sizes[name])
    gemma = _text_encoder(text_encoder, None)
    parts: list[Part] = [checkpoint] if isinstance(gemma, Path) else [checkpoint, gemma]
    raise MissingFiles(plan_parts(f"{repo}:{checkpoint.name}", parts))


def _only_checkpoint(repo: str) -> RemoteFile:
    """The one file of a hub repository that can be its checkpoint."""
    sizes = list_repository(repo)
    side_files = re.compile(r"lora|upscaler|upsampler|embed", re.IGNORECASE)
    candidates = [name for name in safetensors_names(sizes) if not side_files.search(name)]
    if len(candidates) == 1:
        return RemoteFile(repo, candidates[0], sizes[candidates[0]])
    if not candidates:
        raise UserError(f"--model {repo}: the repository holds no .safetensors checkpoint")
    choices = ", ".join(f"{repo}:{name} ({format_bytes(sizes[name])})" for name in candidates[:6])
    raise UserError(f"--model {repo}: holds several files; choose one, such as {choices}")


def safetensors_names(names: Iterable[str]) -> list[str]:
    """The safetensors files among a repository's files."""
    return sorted(name for name in names if name.endswith(".safetensors"))


def looks_like_a_path(text: str) -> bool:
    """Whether what a user typed can only be meant as a path on this machine."""
    head = text.partition(":")[0]
    return head.startswith(("/", "~", "./", "../")) or head.count("/") > 1 or head.endswith(".safetensors")
