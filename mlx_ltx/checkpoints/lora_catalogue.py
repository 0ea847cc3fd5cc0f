"""The LoRAs that are known by name: where they are published, how large they are, and which models they are for.

Repository and file names are those of Lightricks' own lists (MODELS-LTX-2.3.md in Lightricks/LTX-2, and the README of
Lightricks/ComfyUI-LTXVideo).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_ltx.checkpoints.catalogue import LTX_2_LICENCE, Licence, RemoteFile
from mlx_ltx.errors import UserError


@dataclass(frozen=True)
class LoraEntry:
    """One LoRA of the catalogue.

    Attributes:
        name: what a user types after ``--lora``.
        kind: "distilled" (few steps without guidance, for full models), "camera" (a camera move), "in-context" (follows
            a reference video).
        generations: the models that it is published for, as :attr:`ModelEntry.generation`.
    """

    name: str
    title: str
    kind: str
    generations: tuple[str, ...]
    file: RemoteFile
    licence: Licence


def _lora(
    name: str,
    title: str,
    kind: str,
    generations: tuple[str, ...],
    repo: str,
    file: str,
    nbytes: int,
    exact: bool = True,
) -> LoraEntry:
    remote = RemoteFile(f"Lightricks/{repo}", f"{file}.safetensors", nbytes, approximate=not exact)
    return LoraEntry(name, title, kind, generations, remote, LTX_2_LICENCE)


def _camera(move: str, nbytes: int) -> LoraEntry:
    repo = f"LTX-2-19b-LoRA-Camera-Control-{move.title()}"
    title = f"camera move: {move.replace('-', ' ')}"
    return _lora(f"camera-{move}", title, "camera", BOTH, repo, f"ltx-2-19b-lora-camera-control-{move}", nbytes)


# Lightricks' list for LTX-2.3 names the camera moves, the detailer and the pose control of the 19B model as well: they
# were not trained again. The others are for the generation in their names alone.
BOTH = ("2", "2.3")
PUBLISHED_LAYERS = 48  # transformer blocks of the models that they are for
# fmt: off
LORAS: dict[str, LoraEntry] = {
    entry.name: entry
    for entry in (
        _lora("ltx-2.3-distilled-lora", "few-step refinement for ltx-2.3-dev", "distilled", ("2.3",),
              "LTX-2.3", "ltx-2.3-22b-distilled-lora-384-1.1", 7_605_507_256),
        _lora("ltx-2-distilled-lora", "few-step refinement for ltx-2-dev", "distilled", ("2",),
              "LTX-2", "ltx-2-19b-distilled-lora-384", 7_674_600_000, exact=False),
        _camera("dolly-in", 327_309_208),
        _camera("dolly-out", 327_309_208),
        _camera("dolly-left", 327_309_208),
        _camera("dolly-right", 327_309_208),
        _camera("jib-up", 2_214_978_664),
        _camera("jib-down", 2_214_978_664),
        _camera("static", 2_214_978_664),
        _lora("ltx-2.3-union-control", "follows depth, poses or edges", "in-context", ("2.3",),
              "LTX-2.3-22b-IC-LoRA-Union-Control", "ltx-2.3-22b-ic-lora-union-control-ref0.5", 654_465_352),
        _lora("ltx-2.3-motion-track-control", "follows drawn tracks", "in-context", ("2.3",),
              "LTX-2.3-22b-IC-LoRA-Motion-Track-Control",
              "ltx-2.3-22b-ic-lora-motion-track-control-ref0.5", 327_309_314),
        _lora("ltx-2.3-hdr", "makes linear HDR of a video", "in-context", ("2.3",),
              "LTX-2.3-22b-IC-LoRA-HDR", "ltx-2.3-22b-ic-lora-hdr-0.9", 327_309_312),
        _lora("ltx-2.3-dubit", "lets a filmed speaker say something else", "in-context", ("2.3",),
              "LTX-2.3-22b-IC-LoRA-DubIt", "ltx-2.3-22b-ic-lora-dubit-0.9", 2_466_700_000, exact=False),
        _lora("ltx-2-detailer", "adds detail to a video", "in-context", BOTH,
              "LTX-2-19b-IC-LoRA-Detailer", "ltx-2-19b-ic-lora-detailer", 2_617_401_920),
        _lora("ltx-2-pose-control", "follows poses", "in-context", BOTH,
              "LTX-2-19b-IC-LoRA-Pose-Control", "ltx-2-19b-ic-lora-pose-control", 654_465_256),
        _lora("ltx-2-depth-control", "follows depth", "in-context", ("2",),
              "LTX-2-19b-IC-LoRA-Depth-Control", "ltx-2-19b-ic-lora-depth-control", 654_465_256),
        _lora("ltx-2-canny-control", "follows edges", "in-context", ("2",),
              "LTX-2-19b-IC-LoRA-Canny-Control", "ltx-2-19b-ic-lora-canny-control", 654_500_000, exact=False),
    )
}
# fmt: on
CAMERA_MOVES = tuple(name.removeprefix("camera-") for name, entry in LORAS.items() if entry.kind == "camera")


def find_lora(name: str) -> LoraEntry | None:
    """The LoRA with this name, whatever the case, or None."""
    return LORAS.get(name.strip().lower())


def find_lora_file(name: str) -> LoraEntry | None:
    """The LoRA that is published as a file of this name (without folders), or None."""
    return next((entry for entry in LORAS.values() if entry.file.name == name), None)


def distilled_lora(generation: str) -> LoraEntry | None:
    """The distilled LoRA of a generation of models, or None."""
    return next((e for e in LORAS.values() if e.kind == "distilled" and generation in e.generations), None)


def camera_lora(move: str) -> LoraEntry:
    """The LoRA of a camera move.

    Raises:
        UserError: there is none of that name.
    """
    if move.strip().lower() not in CAMERA_MOVES:
        raise UserError(f"--camera {move}: must be one of {', '.join(CAMERA_MOVES)}")
    return LORAS[f"camera-{move.strip().lower()}"]


def generation_of(version: tuple[int, ...]) -> str:
    """The generation of a checkpoint with this model version: "2" for (2, 0), "2.3" for (2, 3, 0)."""
    return "2" if version < (2, 1) else ".".join(map(str, version[:2]))
