"""Embedded prompts on disk: found again, bounded, shared, and never trusted when damaged."""

import os
import threading

import mlx.core as mx
import numpy as np
import pytest

import mlx_ltx
from mlx_ltx.errors import UserError
from mlx_ltx.events import FileWritten, MemorySeen, Planned
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.pipelines.prompt_cache import Embedded, PromptCache, cache_folder
from mlx_ltx.sampling.denoise import TextContext

SMALL = {"model": "demo", "width": 64, "height": 64, "num_frames": 9}


def context(value: float, dtype=mx.bfloat16) -> TextContext:
    return TextContext(mx.full((1, 8, 4), value, dtype), mx.full((1, 8, 2), -value, dtype))


def request(tmp_path, prompt="a red ball", **changes):
    return mlx_ltx.Request(**{**SMALL, "prompt": prompt, "output": tmp_path / "clip.mp4", "force": True, **changes})


def phases(request) -> list[str]:
    return [phase.name for phase in prepare(request).phases()]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_round_trip_keeps_every_bit(tmp_path, dtype):
    cache = PromptCache("model", tmp_path)
    given = TextContext(mx.random.normal((1, 8, 4)).astype(dtype), mx.random.normal((1, 8, 2)).astype(dtype))
    cache.put("text", Embedded.of(given))
    found = cache.get("text").context()
    for a, b in zip(given[:2], found[:2], strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b)


def test_another_text_or_model_is_another_entry(tmp_path):
    cache = PromptCache(["model", 1], tmp_path)
    cache.put("text", Embedded.of(context(1)))
    assert cache.get("text") is not None
    assert cache.get(" text\n") is not None  # as the tokeniser sees it
    assert cache.get("Text") is None
    assert PromptCache(["model", 2], tmp_path).get("text") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_damaged_files_are_ignored_and_replaced(tmp_path, damage):
    cache = PromptCache("model", tmp_path)
    cache.put("text", Embedded.of(context(1)))
    path = cache.path("text")
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes({"cut": data[:-5], "empty": b"", "flipped": flipped, "foreign": b"x" * 500}[damage])
    assert cache.get("text") is None
    cache.put("text", Embedded.of(context(2)))
    assert cache.get("text").context().video[0, 0, 0].item() == 2


def test_the_oldest_goes_when_the_folder_is_full(tmp_path):
    size = len(Embedded.of(context(1)).to_bytes())
    cache = PromptCache("model", tmp_path, limit=3 * size)
    for age, name in enumerate(["a", "b", "c"]):
        cache.put(name, Embedded.of(context(1)))
        os.utime(cache.path(name), ns=(age, age))
    assert cache.get("a") is not None  # used just now, so that b is the oldest
    cache.put("d", Embedded.of(context(1)))
    assert {name for name in "abcd" if cache.get(name)} == {"a", "c", "d"}


def test_many_writers_and_readers_at_once(tmp_path):
    expected = Embedded.of(context(3)).to_bytes()
    wrong = []

    def work():
        cache = PromptCache("model", tmp_path, limit=2 * len(expected))
        for index in range(30):
            cache.put(f"text {index % 4}", Embedded.from_bytes(expected))
            found = cache.get(f"text {(index + 1) % 4}")
            if found is not None and found.to_bytes() != expected:
                wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    cache = PromptCache("model", tmp_path / "file")
    cache.put("text", Embedded.of(context(1)))
    assert cache.get("text") is None


def test_a_known_prompt_does_not_load_the_text_model(tmp_path, monkeypatch):
    first = list(mlx_ltx.stream(request(tmp_path, seed=1, output_audio=tmp_path / "first.wav")))
    assert [phase.name for phase in first[0].phases][:2] == ["read-text", "embed-text"]

    def refuse(*args, **settings):
        raise AssertionError("the text model was loaded")

    monkeypatch.setattr("mlx_ltx.checkpoints.gemma.load_folder", refuse)
    again = list(mlx_ltx.stream(request(tmp_path, seed=1, output_audio=tmp_path / "again.wav")))
    assert isinstance(again[0], Planned)
    names = [phase.name for phase in again[0].phases]
    assert "read-text" not in names
    assert "embed-text" not in names
    assert [event.phase for event in again if isinstance(event, MemorySeen)] == names
    assert any(isinstance(event, FileWritten) for event in again)
    assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "first.wav").read_bytes()


def test_only_new_texts_are_read(tmp_path):
    mlx_ltx.run(request(tmp_path))
    job = prepare(request(tmp_path, prompt="", prompts=("a red ball", "a blue ball")))
    assert job.unread == ["a blue ball"]
    assert "read-text" in [phase.name for phase in job.phases()]
    assert list(job.run())


def test_no_cache_reads_and_keeps_nothing(tmp_path):
    mlx_ltx.run(request(tmp_path, cache=False))
    assert not (cache_folder() / "prompts").exists()
    mlx_ltx.run(request(tmp_path))
    assert phases(request(tmp_path))[0] != "read-text"
    assert phases(request(tmp_path, cache=False))[0] == "read-text"
    assert "cache" not in request(tmp_path, cache=False).settings()


def test_a_prompt_that_will_be_rewritten_is_not_looked_up(tmp_path, instruct_gemma):
    plain = request(tmp_path, text_encoder=str(instruct_gemma))
    mlx_ltx.run(plain)
    assert "read-text" not in phases(plain)
    assert phases(plain.with_changes(enhance_prompt=True))[:2] == ["enhance-prompt", "read-text"]


def test_another_precision_is_read_anew(tmp_path):
    mlx_ltx.run(request(tmp_path, dtype="float32"))
    assert "read-text" not in phases(request(tmp_path, dtype="float32"))
    assert "read-text" in phases(request(tmp_path, dtype="bfloat16"))


def test_changed_weights_are_read_anew(tmp_path):
    from mlx_ltx.pipelines.prompt_cache import file_identity

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    before = file_identity([path])
    os.utime(path, ns=(1, 1))
    assert file_identity([path]) != before


def test_pipelines_without_prompts_do_not_take_it(tmp_path):
    with pytest.raises(UserError, match="--no-cache"):
        prepare(mlx_ltx.Request(model="demo", pipeline="upscale", cache=False, output=tmp_path / "x.mp4"))


def test_embedding_views_are_exact():
    values = np.arange(8, dtype=np.float32)
    kept = Embedded.of(TextContext(mx.array(values)[None, :, None], mx.array(values)[None, :, None]))
    assert kept.dtype == "float32"
    assert np.array_equal(np.array(kept.context().video)[0, :, 0], values)
