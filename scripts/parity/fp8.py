"""Published fp8 weights as they come out of the loader, and what they do to a pass of the whole transformer.

What the set calls ``castpolicy`` is how the reference stores weights under ``fp8-cast``: once more in fp8, without a
scale. Here such weights are held plain, or in one of MLX's formats (whose scales keep more of them in as many bits), so
those tensors are not covered.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_ltx.checkpoints.loading import read_array
from parity import Comparison, GoldenSet, NotCovered, runner

CHECKPOINT = "transformer_23_fp8"


@runner("fp8")
def run_fp8(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    checkpoint = golden.checkpoint(CHECKPOINT)
    cases = sorted({name.partition(".")[0] for name in golden.names})
    for case in cases:
        if case != "dequant":
            yield NotCovered(f"{case} (the reference's storage in fp8 without scales)")
            continue
        for name in golden.names:
            if name.startswith(f"{case}."):
                key = name.removeprefix(f"{case}.")
                yield golden.compare(case, key, read_array(checkpoint, key, mx.float32))
