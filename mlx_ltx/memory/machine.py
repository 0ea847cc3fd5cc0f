"""What the machine has."""

from __future__ import annotations

import os

import mlx.core as mx


def total_memory() -> int:
    """The machine's memory in bytes: what MLX reports on Metal, else the operating system's count of pages."""
    reported = mx.device_info().get("memory_size")
    return int(reported) if reported else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
