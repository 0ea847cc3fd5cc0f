"""What a benchmark measured as a picture: time and memory against the size of the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmark import MIB, Measurement
from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_output


def series_of(results: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The measurements that make lines, by line.

    Raises:
        UserError: there is no line of at least two sizes.
    """
    lines: dict[str, list[Measurement]] = {}
    for result in results:
        if result.series:
            lines.setdefault(result.series, []).append(result)
    if not any(len({point.amount for point in points}) > 1 for points in lines.values()):
        raise UserError("--plot: there is nothing to draw a line through; give several sizes")
    return lines


def draw_plot(results: Sequence[Measurement], path: Path, title: str) -> None:
    """Median, least and most seconds, and peak memory, of each line as a PNG.

    Raises:
        UserError: as :func:`series_of`, or matplotlib is not installed.
    """
    lines = series_of(results)
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot: needs matplotlib; the extra 'plot' brings it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for name, points in lines.items():
        points = sorted(points, key=lambda point: point.amount)
        amounts = [point.amount for point in points]
        (line,) = time.plot(amounts, [point.median for point in points], marker="o", label=name)
        low, high = [min(point.seconds) for point in points], [max(point.seconds) for point in points]
        time.fill_between(amounts, low, high, color=line.get_color(), alpha=0.2)
        memory.plot(amounts, [point.peak_bytes / MIB for point in points], marker="o", label=name)
    units = " or ".join(dict.fromkeys(points[0].unit for points in lines.values()))
    for axes, label in ((time, "seconds"), (memory, "peak MiB beside the weights")):
        axes.set_xlabel(units)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    with atomic_output(path, force=True) as partial:
        figure.savefig(partial, format="png", dpi=100)
    pyplot.close(figure)
