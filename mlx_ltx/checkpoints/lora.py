"""LoRA files: low-rank changes of a transformer's layers, in the layouts that the common tools write.

A file holds, for each layer that it changes, two matrices: ``down`` (A), (rank, inputs), and ``up`` (B), (outputs,
rank). The changed weight is ``W + strength * scale * up @ down``, where the scale is alpha / rank if the file gives an
alpha and 1 if it gives none (Lightricks' trainer saves alpha folded in). https://arxiv.org/abs/2106.09685

Layer names go through the transformer's own key map, after what the tools add or rename has been undone:

- Lightricks and ComfyUI: ``diffusion_model.<layer>.lora_A.weight`` and ``lora_B.weight``;
- diffusers and PEFT: ``transformer.`` or ``base_model.model.``, diffusers' own layer names, and alpha in metadata;
- Kohya: ``lora_unet_<layer with underscores>.lora_down.weight``, ``lora_up.weight`` and ``alpha``.

What to do with a file that has been read is in :mod:`mlx_ltx.checkpoints.lora_switch`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import DIFFUSERS_LAYERS, FLATTENED_LAYERS, TRANSFORMER
from mlx_ltx.checkpoints.recognise import what_else, what_model
from mlx_ltx.errors import UserError

PREFIX = re.compile(r"(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.)?")
FLATTENED_PREFIX = re.compile(r"lora_(unet|transformer)_")
TENSOR = re.compile(
    r"(?P<layer>.+?)\.((?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)|"
    r"(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(\.\w+)?\.weight|(?P<alpha>.+)\.alpha"
)
# Parts of a checkpoint that hold the transformer's neighbours. The reference leaves them as they are, too: it applies
# LoRAs to the transformer alone (ltx_core/loader/fuse_loras.py).
NEIGHBOURS = re.compile(
    r"((video|audio)_(embeddings_)?connector|connectors|text_embedding_projection|text_encoder\w*|(audio_)?vae|vocoder)"
    r"\.|lora_te\d?_"
)
UNSUPPORTED = (
    ("DoRA", re.compile(r".*\.(dora_scale|lora_magnitude_vector(\.\w+)*)")),
    ("LoHa", re.compile(r".*\.hada_\w+")),
    ("LoKr", re.compile(r".*\.lokr_\w+")),
    ("a convolution's LoRA", re.compile(r".*\.lora_mid\.weight")),
    ("whole changed weights", re.compile(r".*\.(diff|diff_b|set_weight)")),
    ("a changed bias", re.compile(r".*\.lora_(A|B|up|down)(\.\w+)?\.bias")),
)
HDR_TRANSFORMS = ("logc3", "acescct")


@dataclass(frozen=True)
class LoraInfo:
    """What a LoRA's metadata says beside its weights.

    Attributes:
        reference_downscale_factor: an in-context LoRA's reference video is smaller than the clip by this factor.
        reference_temporal_scale_factor: and has one frame for so many of the clip's.
        hdr_transform: the curve of an HDR LoRA's frames, "logc3" or "acescct"; None for any other LoRA.
    """

    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1
    hdr_transform: str | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> LoraInfo:
        """Read a file's metadata (ltx_pipelines/{iclora_utils,hdr_ic_lora}.py).

        Raises:
            ValueError: an entry has a value that nothing can be made of; the message names both.
        """
        factors = {}
        for name in ("reference_downscale_factor", "reference_temporal_scale_factor"):
            text = metadata.get(name, "1").strip()
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"its metadata says {name}={text}, which is no whole number from 1")
            factors[name] = int(text)
        # "hdr_transform" names the curve, or is a mere flag like "use_hdr_transform": LogC3 then.
        flags = [metadata.get(name, "").strip().lower() for name in ("hdr_transform", "use_hdr_transform")]
        curve = next((flag for flag in flags if flag not in ("", "false", "0", "none")), None)
        if curve in ("true", "1"):
            curve = HDR_TRANSFORMS[0]
        if curve is not None and curve not in HDR_TRANSFORMS:
            raise ValueError(f"its metadata says hdr_transform={curve}; only {' and '.join(HDR_TRANSFORMS)} are known")
        return cls(**factors, hdr_transform=curve)


@dataclass(frozen=True)
class LoraLayer:
    """One layer's change.

    Attributes:
        name: the layer as the file spells it.
        down, up: the keys of the two matrices.
        inputs, outputs, rank: their sizes.
        scale: alpha / rank.
    """

    name: str
    down: str
    up: str
    inputs: int
    outputs: int
    rank: int
    scale: float


class LoraFile:
    """A LoRA file whose layers have been found and checked against each other; no weights have been read.

    Attributes:
        layers: module path of the transformer to that layer's change.
        neighbours: layers of other networks, which are left as they are, as the file spells them.
        info: what its metadata says.

    Raises:
        UserError: the file is damaged, no LoRA, of an unsupported kind, or its tensors do not fit each other.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.file = SafetensorsFile(path)
        self.path = self.file.path
        try:
            self.info = LoraInfo.from_metadata(self.file.metadata)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None
        parts = self._parts()
        whole_alpha, square_root = self._adapter_alpha()
        self.layers: dict[str, LoraLayer] = {}
        self.neighbours: list[str] = []
        for name, keys in parts.items():
            layer = self._layer(name, keys, whole_alpha, square_root)
            path_in_model = layer_path(name)
            if path_in_model is None:
                self.neighbours.append(name)
            elif path_in_model in self.layers:
                raise UserError(f"{self.path}: changes a layer twice, as {self.layers[path_in_model].name} and {name}")
            else:
                self.layers[path_in_model] = layer

    def factors(self, path: str, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The matrices ``down`` and ``up`` of the layer at ``path``, lazily, without strength and scale."""
        layer = self.layers[path]
        return self.file.arrays[layer.down].astype(dtype), self.file.arrays[layer.up].astype(dtype)

    def _parts(self) -> dict[str, dict[str, str]]:
        """For each layer that the file names, the keys of its ``down``, ``up`` and ``alpha``."""
        parts: dict[str, dict[str, str]] = {}
        unknown = []
        for key in sorted(self.file.tensors):
            for kind, pattern in UNSUPPORTED:
                if pattern.fullmatch(key):
                    raise UserError(f"{self.path}: holds {kind} ({key}), which is not supported; only plain LoRAs are")
            match = TENSOR.fullmatch(key)
            if match is None:
                unknown.append(key)
                continue
            role = next(name for name in ("down", "up", "alpha") if match[name])
            keys = parts.setdefault(match["layer"] or match["alpha"], {})
            if role in keys:
                raise UserError(f"{self.path}: holds two adapters in one file ({keys[role]} and {key})")
            keys[role] = key
        if not any("down" in keys or "up" in keys for keys in parts.values()):
            raise UserError(f"{self.path}: is not a LoRA; it looks like {what_else(self.file) or 'a whole checkpoint'}")
        if unknown:
            raise UserError(f"{self.path}: holds {len(unknown)} tensors that belong to no LoRA ({_some(unknown)})")
        return parts

    def _layer(self, name: str, keys: dict[str, str], whole_alpha: float | None, square_root: bool) -> LoraLayer:
        for role, other in (("down", "up"), ("up", "down")):
            if role not in keys:
                lone = keys.get(other) or keys["alpha"]
                raise UserError(f"{self.path}: {lone} has no {'A' if role == 'down' else 'B'} matrix beside it")
        down, up = (self.file.tensors[keys[role]] for role in ("down", "up"))
        for role, info in (("down", down), ("up", up)):
            if info.dtype not in ("F32", "F16", "BF16"):
                raise UserError(f"{self.path}: tensor {keys[role]} is {info.dtype}; only F32, F16 and BF16 LoRAs load")
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or not down.size or not up.size:
            raise UserError(
                f"{self.path}: the matrices of {name} do not fit each other: A is {list(down.shape)}, B is "
                f"{list(up.shape)}, but they must be [rank, inputs] and [outputs, rank]"
            )
        rank = down.shape[0]
        alpha = self._alpha(keys["alpha"]) if "alpha" in keys else whole_alpha
        scale = 1.0 if alpha is None else alpha / (math.sqrt(rank) if square_root else rank)
        return LoraLayer(name, keys["down"], keys["up"], down.shape[1], up.shape[0], rank, scale)

    def _alpha(self, key: str) -> float:
        if self.file.tensors[key].size != 1:
            raise UserError(f"{self.path}: {key} is {list(self.file.tensors[key].shape)}, not a single number")
        value = float(self.file.arrays[key].astype(mx.float32).item())  # type: ignore[arg-type]
        if not math.isfinite(value):
            raise UserError(f"{self.path}: {key} is {value}")
        return value

    def _adapter_alpha(self) -> tuple[float | None, bool]:
        """PEFT's alpha for all layers, or None, and whether it is divided by the rank's square root.

        Diffusers keeps PEFT's settings in the file's metadata, each named after its network; PEFT itself keeps them in
        a file of their own.
        """
        settings = self.file.json_metadata("lora_adapter_metadata")
        source = f"{self.path}: its metadata"
        if isinstance(settings, dict):
            settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        beside = self.path.with_name("adapter_config.json")
        if settings is None and self.path.name == "adapter_model.safetensors" and beside.is_file():
            source = str(beside)
            try:
                settings = json.loads(beside.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise UserError(f"{beside}: cannot be read as JSON") from None
        if settings is None:
            return None, False
        return _read_adapter_alpha(settings, source)

    def match(self, shapes: Mapping[str, tuple[int, int]], left_out: Iterable[str] = ()) -> LoraMatch:
        """Which of the layers are in a model.

        Args:
            shapes: module path to (outputs, inputs) for every layer of the model.
            left_out: regular expressions; module paths that begin with one are missing on purpose (a silent clip).

        Raises:
            UserError: none of the layers is in the model, or some are of another size.
        """
        patterns = [re.compile(pattern) for pattern in left_out]
        found = [path for path in self.layers if path in shapes]
        skipped = [path for path in self.layers if path not in shapes and any(p.match(path) for p in patterns)]
        missing = [path for path in self.layers if path not in shapes and path not in skipped]
        if not found:
            raise UserError(f"{self.path}: does not fit this model: {self._why_nothing_fits(skipped, missing, shapes)}")
        wrong = [path for path in found if shapes[path] != (self.layers[path].outputs, self.layers[path].inputs)]
        if wrong:
            layer, (outputs, inputs) = self.layers[wrong[0]], shapes[wrong[0]]
            raise UserError(
                f"{self.path}: does not fit this model: {len(wrong)} of {len(self.layers)} layers have another size; "
                f"{layer.name} is {layer.outputs}x{layer.inputs} in the LoRA and {outputs}x{inputs} in the model"
            )
        warnings = []
        if missing:
            names = [self.layers[path].name for path in missing]
            warnings.append(
                f"{self.path.name}: {len(missing)} of {len(self.layers)} layers are not in this model and are left "
                f"out: {_some(names)}"
            )
        if self.neighbours:
            warnings.append(
                f"{self.path.name}: {len(self.neighbours)} layers of the text encoder or other networks are left out; "
                f"only the transformer is changed: {_some(self.neighbours)}"
            )
        return LoraMatch(tuple(found), tuple(warnings))

    def _why_nothing_fits(self, skipped: list[str], missing: list[str], shapes: Mapping[str, tuple[int, int]]) -> str:
        if not self.layers:
            return f"it changes only other networks ({_some(self.neighbours)})"
        if skipped and not missing:
            return f"it changes only what this clip leaves out ({_some([self.layers[p].name for p in skipped])})"
        names = [self.layers[path].name for path in missing]
        # Blocks like this model's, but beyond its last one.
        larger = any(re.match(r"blocks\.\d+\.(video|audio)\.", path) for path in missing)
        made_for = "a larger LTX model" if larger else what_model(names)
        return f"none of its {len(self.layers)} layers is there ({_some(names)}); it looks made for {made_for}"


class LoraMatch(NamedTuple):
    """The layers that a file and a model share, as module paths, and what the user should be told."""

    paths: tuple[str, ...]
    warnings: tuple[str, ...]


class Lora(NamedTuple):
    """A LoRA and how strongly it is applied: 1 as trained, 0 not at all; negative turns its effect round."""

    file: LoraFile
    strength: float = 1.0


def layer_path(name: str) -> str | None:
    """The transformer's module path of a layer as a LoRA file spells it; None for a layer of another network.

    A name that no transformer has comes back as it is, less its prefix.
    """
    below = PREFIX.sub("", name, count=1)
    if NEIGHBOURS.match(below):
        return None
    if FLATTENED_PREFIX.match(below):
        below = _rename(FLATTENED_PREFIX.sub("", below, count=1), FLATTENED_LAYERS)
    below = _rename(below, DIFFUSERS_LAYERS)
    root = TRANSFORMER.roots[0]
    path = TRANSFORMER.path(f"{root}{below}.weight", root)
    return None if path is None else path.removesuffix(".weight")


def _rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _read_adapter_alpha(settings: Any, source: str) -> tuple[float | None, bool]:
    """PEFT's ``lora_alpha`` and ``use_rslora``, if nothing else is asked for."""
    if not isinstance(settings, dict):
        raise UserError(f"{source} has LoRA settings of an unknown form")
    for name in ("use_dora", "alpha_pattern", "lora_bias"):
        if settings.get(name):
            raise UserError(f"{source} asks for {name}, which is not supported")
    alpha = settings.get("lora_alpha")
    if alpha is not None and (not isinstance(alpha, (int, float)) or not math.isfinite(alpha)):
        raise UserError(f"{source} says lora_alpha={alpha}, which is not a number")
    return alpha, bool(settings.get("use_rslora"))


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
