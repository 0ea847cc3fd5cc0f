"""``benchmark.py quantize`` measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import benchmark
import benchmark_quantize
from mlx_ltx.checkpoints.quantize import SETTINGS

CHECKPOINT = Path(__file__).parent / "golden" / "transformer_23.ckpt.safetensors"


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", 128)


def results(tmp_path, *flags) -> list[dict]:
    path = tmp_path / "report.json"
    command = ["quantize", "--checkpoint", CHECKPOINT, "--repeats", "2", "--json", path, *flags]
    assert benchmark.main([*map(str, command)]) == 0
    return json.loads(path.read_text())["results"]


def test_layers_beside_dense_ones(tmp_path, capsys):
    rows = results(tmp_path, "--parts", "speed", "--widths", "256x512", "--tokens", "1", "40", "--settings", "q4")
    names = [row["name"] for row in rows]
    assert names == [f"256 to 512, {n} tokens, float32, {each}" for n in (1, 40) for each in ("dense", "q4")]
    for dense, packed in zip(rows[::2], rows[1::2], strict=True):
        assert len(dense["seconds"]) == len(packed["seconds"]) == 2
        ratio = min(packed["seconds"]) / min(dense["seconds"])
        assert packed["figures"] == {"times dense": pytest.approx(ratio)}
    assert "times dense" in capsys.readouterr().out


def test_errors_of_a_block(tmp_path):
    plain, *rows = results(tmp_path, "--parts", "accuracy", "--block-tokens", "6")
    assert plain["figures"] == {"bits": 16}
    errors = {row["name"].rsplit(" ", 1)[1]: row["figures"] for row in rows}
    assert list(errors) == list(SETTINGS)
    video = {name: figures["video error"] for name, figures in errors.items()}
    assert 0 < 2 * video["q8"] < video["q6"] < video["q5"] < video["q4"] < 0.5
    assert video["q8"] < video["mxfp8"] < video["mxfp4"]
    assert errors["q4"]["bits"] == 4.5
    assert errors["nvfp4"]["bits"] == 4.5
    assert errors["mxfp8"]["bits"] == 8.25


def test_drawn_weights_have_outliers_and_uneven_rows():
    weight = benchmark_quantize.draw_weight(512, 512).astype(mx.float32)
    rows = weight.square().mean(axis=1).sqrt()
    assert (rows.max() / rows.min()).item() > 3
    middle = mx.sort(weight.abs().flatten())[weight.size // 2].item()
    assert 5e-4 < (weight.abs() > 12 * middle).mean().item() < 5e-3
    assert benchmark_quantize.relative_error(weight, weight) == 0


def test_turns_have_equally_many_runs():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    a, b = benchmark.Stopwatch(3, 60).measure_in_turns(runs)
    assert "".join(calls) == "abababab"
    assert len(a.seconds) == len(b.seconds) == 3
    assert (a.name, b.name) == ("a", "b")
    calls.clear()
    a, _ = benchmark.Stopwatch(3, 1e-9).measure_in_turns(runs)
    assert len(a.seconds) == 1  # beside the warm-up, however slow


def test_it_runs_as_a_script():
    flags = ["quantize", "--parts", "speed", "--widths", "64x64", "--tokens", "3", "--settings", "q8", "--repeats", "1"]
    script = Path(benchmark.__file__)
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "64 to 64, 3 tokens, float32, q8" in done.stdout


@pytest.mark.parametrize(("flags", "message"), [(["--settings", "q7"], "q7"), (["--widths", "64"], "is not a size")])
def test_a_mistake_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit):
        benchmark.main(["quantize", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
