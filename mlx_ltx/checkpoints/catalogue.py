"""The models that are known by name: where their files are published, how large they are and what they are for.

Repository and file names are those of Lightricks' own list (MODELS-LTX-2.3.md in Lightricks/LTX-2) and of the
repositories' listings. A size that could not be confirmed to the byte is marked approximate and shown with a ``~``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mlx_ltx.errors import UserError

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Licence:
    """The terms under which files are published."""

    name: str
    url: str


@dataclass(frozen=True)
class RemoteFile:
    """One file of a Hugging Face repository; ``nbytes`` is exact unless ``approximate``."""

    repo: str
    name: str
    nbytes: int
    approximate: bool = False

    def selects(self, name: str) -> bool:
        return name == self.name


@dataclass(frozen=True)
class TextEncoderEntry:
    """A Gemma 3 folder on the hub: those files of ``repo`` that match ``patterns``, ``nbytes`` in all."""

    name: str
    repo: str
    nbytes: int
    title: str
    licence: Licence
    gated: bool = False
    patterns: tuple[str, ...] = (
        "*.safetensors",
        "*.safetensors.index.json",
        "*config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "chat_template*",
    )
    approximate: bool = True

    def selects(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue.

    Attributes:
        name: what a user types; ``aliases`` work as well.
        generation: "2" (19B) or "2.3" (22B); "demo" for the embedded one.
        distilled: whether it was distilled to few steps without guidance.
        checkpoint: the whole-model file; None for the embedded demo, whose files lie in :func:`demo_folder`.
        spatial_upsampler: the x2 latent upsampler that its pipelines need, if they do.
        text_encoder: the Gemma folder that is downloaded with it; None for the embedded demo.
        transformer_nbytes: the transformer's size in memory at its published precision (bf16).
        pipelines: the pipelines that it serves, the default one first.
        default_size: the (width, height) in pixels of a clip unless asked otherwise; None leaves it to the pipeline.
        default_frames: likewise its number of frames.
        gated: whether the checkpoint's repository asks for an accepted licence before it lets one download.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    generation: str
    distilled: bool
    checkpoint: RemoteFile | None
    spatial_upsampler: RemoteFile | None
    text_encoder: TextEncoderEntry | None
    transformer_nbytes: int
    pipelines: tuple[str, ...]
    licence: Licence
    gated: bool = False
    note: str = ""
    default_size: tuple[int, int] | None = None
    default_frames: int | None = None

    @property
    def embedded(self) -> bool:
        """Whether it comes with the package instead of the hub."""
        return self.checkpoint is None


LTX_2_LICENCE = Licence("LTX-2 Community License Agreement", "https://github.com/Lightricks/LTX-2/blob/main/LICENSE-2")
GEMMA_LICENCE = Licence("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
APACHE_LICENCE = Licence("Apache 2.0", "https://www.apache.org/licenses/LICENSE-2.0")

# LTX-2 and LTX-2.3 were trained on Google's quantisation-aware Gemma 3 12B. The mlx-community packs with "qat" in
# their names are conversions of exactly those weights, and ask for no login.
TEXT_ENCODERS: dict[str, TextEncoderEntry] = {
    entry.name: entry
    for entry in (
        TextEncoderEntry(
            "gemma-3-12b-8bit",
            "mlx-community/gemma-3-12b-it-qat-8bit",
            14_300_000_000,
            "Gemma 3 12B, 8 bits (the default)",
            GEMMA_LICENCE,
        ),
        TextEncoderEntry(
            "gemma-3-12b-6bit",
            "mlx-community/gemma-3-12b-it-qat-6bit",
            11_200_000_000,
            "Gemma 3 12B, 6 bits",
            GEMMA_LICENCE,
        ),
        TextEncoderEntry(
            "gemma-3-12b-4bit",
            "mlx-community/gemma-3-12b-it-qat-4bit",
            8_000_000_000,
            "Gemma 3 12B, 4 bits (the smallest)",
            GEMMA_LICENCE,
        ),
        TextEncoderEntry(
            "gemma-3-12b-bf16",
            "mlx-community/gemma-3-12b-it-qat-bf16",
            24_400_000_000,
            "Gemma 3 12B, bf16 (the reference's precision)",
            GEMMA_LICENCE,
        ),
        TextEncoderEntry(
            "gemma-3-12b-google",
            "google/gemma-3-12b-it-qat-q4_0-unquantized",
            24_400_000_000,
            "Gemma 3 12B, bf16, Google's own files (the licence has to be accepted first)",
            GEMMA_LICENCE,
            gated=True,
        ),
    )
}
DEFAULT_TEXT_ENCODER = TEXT_ENCODERS["gemma-3-12b-8bit"]

# The order is the order of preference: the newer generation first, and the fast distilled models first.
MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry(
            name="ltx-2.3-distilled",
            aliases=("ltx-2.3", "ltx-2.3-22b-distilled", "ltx-2.3-22b-distilled-1.1"),
            title="LTX-2.3 22B, distilled (8 + 3 steps)",
            generation="2.3",
            distilled=True,
            checkpoint=RemoteFile("Lightricks/LTX-2.3", "ltx-2.3-22b-distilled-1.1.safetensors", 46_149_345_334),
            spatial_upsampler=RemoteFile(
                "Lightricks/LTX-2.3", "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", 995_743_560
            ),
            text_encoder=DEFAULT_TEXT_ENCODER,
            transformer_nbytes=2 * 18_988_838_144,
            pipelines=("distilled",),
            licence=LTX_2_LICENCE,
            note="the fastest way to a clip; start here",
        ),
        ModelEntry(
            name="ltx-2-distilled",
            aliases=("ltx-2", "ltx-2-19b-distilled"),
            title="LTX-2 19B, distilled (8 + 3 steps)",
            generation="2",
            distilled=True,
            checkpoint=RemoteFile("Lightricks/LTX-2", "ltx-2-19b-distilled.safetensors", 43_300_000_000, True),
            spatial_upsampler=RemoteFile(
                "Lightricks/LTX-2", "ltx-2-spatial-upscaler-x2-1.0.safetensors", 995_800_000, True
            ),
            text_encoder=DEFAULT_TEXT_ENCODER,
            transformer_nbytes=2 * 18_876_174_592,
            pipelines=("distilled",),
            licence=LTX_2_LICENCE,
            note="the first generation",
        ),
        ModelEntry(
            name="ltx-2.3-dev",
            aliases=("ltx-2.3-22b-dev",),
            title="LTX-2.3 22B, full model (guided, 30 steps)",
            generation="2.3",
            distilled=False,
            checkpoint=RemoteFile("Lightricks/LTX-2.3", "ltx-2.3-22b-dev.safetensors", 46_149_344_974),
            spatial_upsampler=None,
            text_encoder=DEFAULT_TEXT_ENCODER,
            transformer_nbytes=2 * 18_988_838_144,
            pipelines=("one-stage",),
            licence=LTX_2_LICENCE,
            note="slower, with guidance and negative prompts",
        ),
        ModelEntry(
            name="ltx-2-dev",
            aliases=("ltx-2-19b-dev",),
            title="LTX-2 19B, full model (guided, 40 steps)",
            generation="2",
            distilled=False,
            checkpoint=RemoteFile("Lightricks/LTX-2", "ltx-2-19b-dev.safetensors", 43_300_000_000, True),
            spatial_upsampler=None,
            text_encoder=DEFAULT_TEXT_ENCODER,
            transformer_nbytes=2 * 18_876_174_592,
            pipelines=("one-stage",),
            licence=LTX_2_LICENCE,
            note="the first generation",
        ),
        ModelEntry(
            name="demo",
            aliases=(),
            title="the tiny embedded demo",
            generation="demo",
            distilled=True,
            checkpoint=None,
            spatial_upsampler=None,
            text_encoder=None,
            transformer_nbytes=0,
            pipelines=("distilled", "one-stage"),
            licence=APACHE_LICENCE,
            default_size=(128, 96),
            default_frames=49,
            note="comes with the package; draws coloured shapes that move, with sound",
        ),
    )
}


def find_model(name: str) -> ModelEntry | None:
    """The entry with this name or alias, whatever the case, or None."""
    wanted = name.strip().lower()
    return next((entry for entry in MODELS.values() if wanted == entry.name or wanted in entry.aliases), None)


def find_checkpoint(repo: str, name: str) -> ModelEntry | None:
    """The entry whose checkpoint is the file ``name`` of ``repo``, or None."""
    for entry in MODELS.values():
        if entry.checkpoint and (entry.checkpoint.repo.lower(), entry.checkpoint.name) == (repo.lower(), name):
            return entry
    return None


def similar_names(name: str, names: list[str]) -> list[str]:
    """Up to three of ``names`` that ``name`` may be a misspelling of, the closest first."""
    return difflib.get_close_matches(name.strip().lower(), names, n=3, cutoff=0.6)


def model_names() -> list[str]:
    """Every name and alias of the catalogue."""
    return [name for entry in MODELS.values() for name in (entry.name, *entry.aliases)]


def is_distilled(model: ModelEntry | str | Path) -> bool:
    """Whether a model was distilled; only ever used to choose its default pipeline.

    A checkpoint's metadata does not say it. So a catalogue entry decides, and for any other file its name: distilled
    if it contains "distilled" (a folder's name does not count).
    """
    if isinstance(model, ModelEntry):
        return model.distilled
    return "distilled" in Path(model).name.lower()


def demo_folder() -> Path:
    """The folder with the embedded demo's files: ``weights/demo`` of a source checkout, else the package's ``_demo``.

    Raises:
        UserError: this installation has neither.
    """
    for folder in (PACKAGE.parent / "weights" / "demo", PACKAGE / "_demo"):
        if folder.is_dir():
            return folder
    raise UserError("demo: this installation carries no demo weights; install mlx-ltx from its wheel or repository")
