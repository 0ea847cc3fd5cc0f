"""The benchmark measures what it says: runs, memory and rates are checked on work whose cost is known."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

import benchmark
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.models.video_vae import VideoVaeConfig
from mlx_ltx.models.vocoder import VocoderConfig

GOLDEN = Path(__file__).parent / "golden"
TRANSFORMER, VIDEO_VAE, VOCODER, TEXT = (
    GOLDEN / f"{name}.ckpt.safetensors" for name in ("transformer_23", "video_vae_23", "vocoder_23", "text_23")
)
COMMANDS = {
    "end-to-end": ["end-to-end", "--pipeline", "distilled", "--size", "128x64", "--frames", "9"],
    "block": ["block", "--checkpoint", TRANSFORMER, "--tokens", "4", "12", "--audio-tokens", "3", "--text-tokens", "5"],
    "decode": ["decode", "--checkpoint", VIDEO_VAE, "--size", "64x96", "--frames", "17"],
    "encode": ["encode", "--checkpoint", VIDEO_VAE, "--size", "64x96", "--frames", "9"],
    "vocoder": ["vocoder", "--checkpoint", VOCODER, "--seconds", "0.1", "0.2"],
    "text": ["text", "--checkpoint", TEXT, "--gemma", GOLDEN / "gemma3_tiny", "--tokens", "8"],
}


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", 128)


def run(capsys, tmp_path, *flags) -> tuple[str, dict]:
    path = tmp_path / "report.json"
    assert benchmark.main([*map(str, flags), "--json", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out, json.loads(path.read_text())


def failed(capsys, *flags) -> str:
    """The one line on stderr of a command that fails."""
    try:
        code = benchmark.main([*map(str, flags)])
    except SystemExit as exit:
        code = exit.code
    assert code in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_gives_sane_numbers(capsys, tmp_path, command):
    out, report = run(capsys, tmp_path, *COMMANDS[command], "--repeats", "2")
    assert {"processor", "cores", "memory_gib", "mlx", "device", "blas"} <= report["machine"].keys()
    assert all(rate > 0 for rate in report["machine"]["matmul_gflops"].values())
    assert report["settings"]["repeats"] == 2
    assert len(report["results"]) == {"end-to-end": 9, "text": 4}.get(command, 2)
    for result in report["results"]:
        assert len(result["seconds"]) == 2
        assert 0 < min(result["seconds"]) <= result["median_seconds"] <= max(result["seconds"]) < 60
        assert result["peak_bytes"] > 0
        line = next(line for line in out.splitlines() if line.startswith(result["name"] + "  "))
        assert f" {result['median_seconds']:.3f} " in line
        if result["amount"]:
            figures = "".join(f", {name} {value:.3g}" for name, value in result["figures"].items())
            assert line.endswith(f" {result['amount'] / result['median_seconds']:.3g} {result['unit']}/s{figures}")


def test_the_whole_demo_clip_takes_as_long_as_its_phases(capsys, tmp_path):
    _, report = run(capsys, tmp_path, *COMMANDS["end-to-end"], "--repeats", "1")
    *phases, whole = report["results"]
    assert whole["name"] == "the whole clip"
    assert 0.5 * whole["median_seconds"] < sum(phase["median_seconds"] for phase in phases) < whole["median_seconds"]
    assert whole["peak_bytes"] == max(phase["peak_bytes"] for phase in phases)


def test_streaming_needs_less_memory_than_a_whole_clip(capsys, tmp_path):
    flags = ["decode", "--checkpoint", VIDEO_VAE, "--size", "64x64", "--frames", "65", "--repeats", "1"]
    streamed, whole = run(capsys, tmp_path, *flags)[1]["results"]
    assert streamed["name"].startswith("streamed")
    assert 2 * streamed["peak_bytes"] < whole["peak_bytes"]
    (only,) = run(capsys, tmp_path, *flags, "--modes", "whole")[1]["results"]
    assert only["name"] == whole["name"]


def test_bands_and_tiles_of_a_size_that_is_rounded_up(capsys, tmp_path):
    flags = ["decode", "--checkpoint", VIDEO_VAE, "--size", "64x130", "--frames", "9", "--repeats", "1"]
    flags += ["--modes", "bands", "tiled", "streamed", "--bands", "3"]
    results = run(capsys, tmp_path, *flags)[1]["results"]
    assert [result["name"].split(", 64x160, 9 frames")[0] for result in results] == ["streamed", "3 bands", "tiled"]
    streamed, bands, tiled = (result["figures"] for result in results)
    assert streamed["MiB predicted"] > 0
    assert 1 < bands["times the work"] <= 3
    assert tiled == {}


def test_streaming_an_encode_needs_less_memory_than_a_whole_clip(capsys, tmp_path):
    flags = ["encode", "--checkpoint", VIDEO_VAE, "--size", "64x64", "--frames", "65", "--repeats", "1"]
    streamed, whole = run(capsys, tmp_path, *flags)[1]["results"]
    assert 2 * streamed["peak_bytes"] < whole["peak_bytes"]
    assert 0 < streamed["figures"]["MiB predicted"] * benchmark.MIB < whole["peak_bytes"]


def test_the_plan_stands_beside_what_was_measured(capsys, tmp_path):
    flags = ["plan", "--size", "64x64", "--frames", "9", "--repeats", "1"]
    making, *phases = run(capsys, tmp_path, *flags)[1]["results"]
    assert making["name"] == "making the plan"
    assert len(phases) == 8
    for phase in phases:
        predicted, ratio = phase["figures"]["MiB predicted"], phase["figures"]["of what was measured"]
        assert predicted * benchmark.MIB / ratio == pytest.approx(phase["peak_bytes"])
        assert 0.5 < ratio < 2


def test_a_plot_has_a_line_for_each_way(capsys, tmp_path):
    picture = tmp_path / "plot.png"
    flags = ["decode", "--checkpoint", VIDEO_VAE, "--frames", "9", "17", "--repeats", "1", "--plot", picture]
    results = run(capsys, tmp_path, *flags)[1]["results"]
    assert [(result["series"], result["amount"]) for result in results] == [
        (series, frames) for frames in (9, 17) for series in ("streamed", "whole")
    ]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 500)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_a_single_size_makes_no_plot(capsys, tmp_path):
    picture = tmp_path / "plot.png"
    flags = ["vocoder", "--checkpoint", VOCODER, "--seconds", "0.1", "--repeats", "1", "--plot", picture]
    assert "give several sizes" in failed(capsys, *flags)
    assert not picture.exists()


def test_the_dtype_is_used(capsys, tmp_path):
    flags = ["block", "--checkpoint", TRANSFORMER, "--tokens", "512", "--repeats", "2"]
    wide, narrow = (
        run(capsys, tmp_path, *flags, "--dtype", dtype)[1]["results"][0] for dtype in ("float32", "bfloat16")
    )
    assert narrow["name"].endswith("bfloat16")
    assert wide["name"].endswith("float32")
    assert narrow["peak_bytes"] < 0.8 * wide["peak_bytes"]


def test_the_published_widths_are_the_default():
    arguments = benchmark.build_parser().parse_args(["block"])
    config = benchmark.load_config(arguments, TransformerConfig.from_metadata)
    assert (config.video.dim, config.audio.dim) == (4096, 2048)
    assert benchmark.load_config(arguments, VideoVaeConfig.from_metadata).space_scale == 32
    assert benchmark.load_config(arguments, VocoderConfig.from_metadata).sample_rate == 48_000


class Clock:
    """Time that passes only where a run says so."""

    def __init__(self, *durations: float):
        self.now, self.durations = 100.0, list(durations)

    def perf_counter(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.durations.pop(0)


@pytest.mark.parametrize(
    ("repeats", "limit", "durations", "counted"),
    [
        (3, 60, [9, 1, 5, 2], (1, 5, 2)),  # the warm-up does not count
        (5, 10, [4, 3, 4], (3, 4)),  # no run begins after the limit
        (5, 10, [20], (20,)),  # nothing but a warm-up: better than nothing
    ],
)
def test_runs_and_limits(monkeypatch, repeats, limit, durations, counted):
    clock = Clock(*durations)
    monkeypatch.setattr(benchmark, "time", clock)
    result = benchmark.Stopwatch(repeats, limit).measure("x", clock.run, amount=6, unit="frames")
    assert result.seconds == counted
    assert not clock.durations


def test_median_spread_and_rate():
    row = benchmark.Measurement("x", (4.0, 1.0, 2.0), 3 << 20, amount=6, unit="frames").row()
    assert row == ["x", "2.000", "1.000 to 4.000", "3", "3.0", "3 frames/s"]
    assert benchmark.Measurement("x", (1.0,), 0).row()[-1] == ""


def test_peak_memory_is_what_the_run_adds():
    held = mx.ones(16 << 20, dtype=mx.uint8)
    mx.eval(held)
    result = benchmark.Stopwatch(2, 60).measure("x", lambda: mx.eval(mx.ones(5 << 20, dtype=mx.uint8)))
    assert 5 << 20 <= result.peak_bytes < 6 << 20
    assert held.size == 16 << 20  # still held


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "required"),
        (["encod"], "invalid choice: 'encod'"),
        (["block", "--repeats", "0"], "--repeats: 0 is not a positive whole number"),
        (["block", "--tokens", "many"], "--tokens: many is not a positive whole number"),
        (["vocoder", "--seconds", "nan"], "--seconds: nan is not a positive number"),
        (["decode", "--size", "256"], "--size: 256 is not a size such as 192x128"),
        (
            ["decode", "--checkpoint", VIDEO_VAE, "--modes", "bands", "--bands", "3"],
            "--bands 3: the picture has 2 rows",
        ),
        (["decode", "--checkpoint", VIDEO_VAE, "--frames", "10"], "--frames 10: must be"),
        (["decode", "--checkpoint", TRANSFORMER], "vae"),
        (["decode", "--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["demo", "--model", "demoo"], "did you mean demo?"),
        (["vocoder", "--json", GOLDEN], "is a folder"),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, message):
    assert message in failed(capsys, *flags)


def test_it_runs_as_a_script():
    script = Path(benchmark.__file__)
    flags = ["vocoder", "--checkpoint", VOCODER, "--seconds", "0.05", "--repeats", "1"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "vocoder, 0.05 s at" in done.stdout
