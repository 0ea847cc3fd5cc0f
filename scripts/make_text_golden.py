"""Record what Hugging Face's Gemma 3 writes, with and without an image, for ``parity.enhance``.

Needs the ``parity`` extra. Usage: python scripts/make_text_golden.py GEMMA_FOLDER OUTPUT.io.safetensors
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Gemma3ForConditionalGeneration

BEFORE, AFTER, WRITTEN = 21, 9, 30  # tokens: more than the tiny model's sliding window


def main(folder: str, output: str) -> None:
    model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    config = model.config
    rng = np.random.default_rng(5)
    size, words = config.vision_config.image_size, range(4, 46)
    image = torch.tensor(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    pixels = image.permute(2, 0, 1)[None].float() / 127.5 - 1
    before, after = (rng.choice(words, count).tolist() for count in (BEFORE, AFTER))
    shown = [config.image_token_id] * config.mm_tokens_per_image

    tensors = {"image.pixels": image}
    for case, ids, given in (("text", before, {}), ("image", before + shown + after, {"pixel_values": pixels})):
        tokens = torch.tensor([ids])
        if given:
            given["token_type_ids"] = (tokens == config.image_token_id).int()
        with torch.inference_mode():
            result = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=WRITTEN,
                min_new_tokens=WRITTEN,
                return_dict_in_generate=True,
                output_logits=True,
                **given,
            )
        tensors[f"{case}.input_ids"] = tokens
        tensors[f"{case}.written"] = result.sequences[0, len(ids) :]
        tensors[f"{case}.logits"] = torch.stack(result.logits, dim=1)[0]
    with torch.inference_mode():
        features = model.model.get_image_features(pixels)
    tensors["image.features"] = getattr(features, "pooler_output", features).reshape(1, len(shown), -1)
    cases = {"text": {}, "image": {"first": BEFORE}}
    save_file({key: value.contiguous() for key, value in tensors.items()}, output, {"cases": json.dumps(cases)})


if __name__ == "__main__":
    main(*sys.argv[1:])
