"""Where each network's tensors stand in a published checkpoint: one key map per network, and nothing else.

The modules of ``mlx_ltx.models`` carry the official names wherever they can, so that a map says only where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KeyMap:
    """How checkpoint keys become module parameter paths.

    Attributes:
        name: what the network is called in messages.
        roots: alternative prefixes of the whole component; the first under which any part occurs is used.
        parts: for each prefix below the root, what replaces it in the module ("" for the module itself).
        exclude: prefixes below the root that belong to another network.
        renames: (regular expression, replacement) pairs applied in order to the module path.
        unused: regular expressions of keys that real files hold and that no network reads.
    """

    name: str
    roots: tuple[str, ...]
    parts: dict[str, str] = field(default_factory=lambda: {"": ""})
    exclude: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    def select(self, keys: Iterable[str]) -> dict[str, str]:
        """Module path to checkpoint key, for every key of this network among ``keys``."""
        keys = list(keys)
        for root in self.roots:
            selected = {path: key for key in keys if (path := self.path(key, root)) is not None}
            if selected:
                return selected
        return {}

    def path(self, key: str, root: str) -> str | None:
        """The module path of one key below ``root``, or None if this network does not own it."""
        if not key.startswith(root):
            return None
        below = key[len(root) :]
        if below.startswith(self.exclude) or any(re.fullmatch(pattern, below) for pattern in self.unused):
            return None
        for prefix, replacement in self.parts.items():
            if below.startswith(prefix):
                path = replacement + below[len(prefix) :]
                for pattern, substitute in self.renames:
                    path = re.sub(pattern, substitute, path)
                return path
        return None


CONNECTORS_BELOW = ("video_embeddings_connector.", "audio_embeddings_connector.")
ATTENTION = ((r"\bto_out\.0\.", "to_out."), (r"\bff\.net\.0\.proj\.", "ff.up."), (r"\bff\.net\.2\.", "ff.down."))
STATISTICS = ((r"\bmean-of-means$", "mean"), (r"\bstd-of-means$", "std"))
UNUSED_STATISTICS = (r"per_channel_statistics\.(?!mean-of-means$|std-of-means$).*",)

TRANSFORMER = KeyMap(
    name="transformer",
    roots=("model.diffusion_model.",),
    exclude=CONNECTORS_BELOW,
    renames=(*ATTENTION, (r"\baudio_ff\.net\.0\.proj\.", "audio_ff.up."), (r"\baudio_ff\.net\.2\.", "audio_ff.down.")),
)
CONNECTORS = KeyMap(
    name="text connectors",
    roots=("model.diffusion_model.",),
    parts={"video_embeddings_connector.": "video.", "audio_embeddings_connector.": "audio."},
    renames=ATTENTION,
)
TEXT_PROJECTION = KeyMap(name="text projection", roots=("text_embedding_projection.",))
VIDEO_ENCODER = KeyMap(
    name="video encoder",
    roots=("vae.", ""),
    parts={"encoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
VIDEO_DECODER = KeyMap(
    name="video decoder",
    roots=("vae.", ""),
    parts={"decoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
AUDIO_ENCODER = KeyMap(
    name="audio encoder",
    roots=("audio_vae.",),
    parts={"encoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
AUDIO_DECODER = KeyMap(
    name="audio decoder",
    roots=("audio_vae.",),
    parts={"decoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
VOCODER = KeyMap(name="vocoder", roots=("vocoder.",), unused=(r"mel_stft\.stft_fn\.inverse_basis",))
UPSAMPLER = KeyMap(name="latent upsampler", roots=("",))
