"""Gemma 3's eyes: the vision tower and the projector of a Gemma folder, run by ``mlx-vlm`` (the ``vision`` extra).

Only these two are taken from that library, and only their weights are loaded (0.8 GB of the 12B model): what they see
goes to the text model that is in memory anyway. Proved on a tiny Gemma 3 against transformers; nobody has run it with
the published weights here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_ltx.checkpoints.files import SafetensorsFolder
from mlx_ltx.checkpoints.gemma import load_folder, read_gemma_config
from mlx_ltx.checkpoints.keymaps import KeyMap

VISION = KeyMap(
    name="Gemma 3 vision tower",
    roots=("model.", ""),
    parts={"vision_tower.": "vision_tower.", "multi_modal_projector.": "multi_modal_projector."},
    unused=(r"vision_tower\.vision_model\.head\..*",),
)
INSTALL = 'pip install "mlx-ltx[vision]"'


class NoVision(Exception):
    """Images cannot be shown to the text model, for a reason that the message says in one line."""


class Vision(nn.Module):
    """The two networks under the names that they have in the published files.

    Args:
        metadata: the whole ``config.json`` of a multimodal Gemma 3.
    """

    def __init__(self, metadata: dict[str, Any]):
        from mlx_vlm.models.gemma3.config import ModelConfig, TextConfig, VisionConfig
        from mlx_vlm.models.gemma3.gemma3 import Gemma3MultiModalProjector
        from mlx_vlm.models.gemma3.vision import VisionModel

        super().__init__()
        vision = VisionConfig.from_dict(metadata["vision_config"])
        text = TextConfig.from_dict(metadata["text_config"])
        text.mm_tokens_per_image = metadata.get("mm_tokens_per_image", text.mm_tokens_per_image)
        self.vision_tower = VisionModel(vision)
        self.multi_modal_projector = Gemma3MultiModalProjector(
            ModelConfig(text_config=text, vision_config=vision, model_type="gemma3")
        )
        # mlx-vlm leaves MLX's default of 1e-5 here
        self.vision_tower.vision_model.post_layernorm.eps = vision.layer_norm_eps
        self._size = vision.image_size

    def __call__(self, image: np.ndarray) -> mx.array:
        """(H, W, 3) uint8 sRGB to what the text model reads, (1, tokens, hidden_size).

        The image is squeezed to the tower's square, as Gemma 3's own processor does it.
        """
        square = Image.fromarray(image).resize((self._size, self._size), Image.Resampling.BILINEAR)
        pixels = mx.array(np.asarray(square, np.float32) / 127.5 - 1)
        dtype = self.vision_tower.vision_model.embeddings.patch_embedding.weight.dtype
        seen, _, _ = self.vision_tower(pixels[None].astype(dtype))
        return self.multi_modal_projector(seen)


def load_vision(folder: Path, dtype: mx.Dtype) -> tuple[Vision, int]:
    """The vision networks of a Gemma folder, lazily, and the id of the token that stands for a part of an image.

    Raises:
        NoVision: ``mlx-vlm`` is not installed, or the folder holds a text model alone.
        UserError: the folder's vision networks are damaged or do not match its config.
    """
    _, metadata = read_gemma_config(folder)
    image_id = metadata.get("image_token_index", metadata.get("image_token_id"))
    described = "vision_config" in metadata and VISION.select(SafetensorsFolder(folder).tensors)
    if not described or not isinstance(image_id, int):
        raise NoVision(f"{folder.name} holds a text model alone, without the part that sees images")
    try:
        vision = Vision(metadata)
    except ModuleNotFoundError as error:
        if error.name != "mlx_vlm":
            raise NoVision(f"mlx-vlm cannot be imported ({error}): {INSTALL}") from None
        raise NoVision(f"showing the image to the text model needs mlx-vlm: {INSTALL}") from None
    load_folder(vision, folder, VISION, metadata, dtype)
    return vision, image_id
