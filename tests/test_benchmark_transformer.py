"""``benchmark.py step`` and ``stream``: they count and measure what they say."""

import json
from pathlib import Path

import pytest

import benchmark
import benchmark_transformer

TRANSFORMER = Path(__file__).parent / "golden" / "transformer_23.ckpt.safetensors"
TOKENS = ["--tokens", "4", "--audio-tokens", "3", "--text-tokens", "5"]


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch):
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", 128)


def run(tmp_path, *flags) -> list[dict]:
    path = tmp_path / "report.json"
    assert benchmark.main([*map(str, flags), "--json", str(path)]) == 0
    return json.loads(path.read_text())["results"]


def test_a_guided_step_is_counted_with_what_its_passes_share(tmp_path):
    flags = ["step", "--checkpoint", TRANSFORMER, *TOKENS, "--repeats", "2", "--layers", "12"]
    apart, together = run(tmp_path, *flags)
    assert (apart["figures"]["blocks"], together["figures"]["blocks"]) == (48, 3 * 7 + 4 * 5)
    assert len(apart["seconds"]) == len(together["seconds"]) == 2
    share = together["figures"]["of the four passes' time"]
    assert share == pytest.approx(together["median_seconds"] / apart["median_seconds"])


def test_streaming_is_compared_with_reading_and_computing_alone(tmp_path):
    flags = ["stream", "--checkpoint", TRANSFORMER, *TOKENS, "--repeats", "1"]
    results = run(tmp_path, *flags)
    assert [result["name"].rsplit(",")[0] for result in results] == [
        "reading alone", "in memory", "streamed", "streamed",
    ]  # fmt: skip
    assert all(result["peak_bytes"] > 0 for result in results)
    assert all(0 <= result["figures"]["reading hidden"] <= 1 for result in results[2:])


def test_a_checkpoint_for_streaming_is_written_and_removed(tmp_path, monkeypatch):
    written = []

    def write(path, config, names):
        assert config["transformer"]["num_layers"] == 2
        written.append(path)
        path.write_bytes(TRANSFORMER.read_bytes())

    monkeypatch.setattr(benchmark_transformer, "write_checkpoint", write)
    run(tmp_path, "stream", "--folder", tmp_path, "--layers", 2, *TOKENS, "--repeats", 1)
    assert len(written) == 1
    assert not written[0].exists()
