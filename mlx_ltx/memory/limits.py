"""MLX's own limits, set from a plan while a job runs, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_ltx.memory.plan import Plan

LEAST_CACHE = 256 << 20


@contextmanager
def memory_limits(plan: Plan) -> Iterator[None]:
    """Set MLX's limits for the job of ``plan``, and put back what was set before.

    Memory: what the plan's phases should stay under, or the highest peak if that is more; beyond it MLX waits for work
    in progress before it begins more.

    Cache: what the highest peak leaves of that, so that freed buffers do not crowd out the rest of the machine.

    Wired (Metal only): the highest peak, as far as the GPU allows, so that weights stay where the GPU finds them.
    """
    room = max(plan.limit_bytes, plan.peak_bytes)
    memory = mx.set_memory_limit(room)
    cache = mx.set_cache_limit(max(room - plan.peak_bytes, LEAST_CACHE))
    wired = mx.set_wired_limit(_wirable(plan.peak_bytes)) if mx.metal.is_available() else None
    try:
        yield
    finally:
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)


def _wirable(size: int) -> int:
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return min(size, int(recommended)) if recommended else 0
