"""Prompt enhancement: what Gemma 3 would write next, token after token, as Hugging Face's implementation has it.

The recorded tokens are put in, so that one rounding cannot lead to another text. ``image.features``, what mlx-vlm makes
of an image, is not compared here, because that library is optional: its own test does it.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.models.gemma_generate import Continuation, ImageTokens
from parity import Comparison, GoldenSet, runner
from parity.text import GEMMA_FOLDER, finish


@runner("gemma3_generate*")
def run_generate(golden: GoldenSet) -> Iterator[Comparison]:
    model = load_gemma(golden.folder / GEMMA_FOLDER, mx.float32).model
    for case, values in golden.cases.items():
        ids, written = golden.mx(f"{case}.input_ids"), golden.mx(f"{case}.written")
        image = ImageTokens(golden.mx(f"{case}.features"), values["first"]) if "first" in values else None
        text = Continuation(model, ids.shape[1] + written.size)
        logits = [finish(text.read(ids, image))]
        logits += [text.step(written[place : place + 1]) for place in range(written.size - 1)]
        yield golden.compare(case, "logits", mx.concatenate(logits))
