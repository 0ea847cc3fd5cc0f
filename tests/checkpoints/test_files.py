"""Safetensors files as they arrive: whole, cut off, damaged, or something else altogether."""

from __future__ import annotations

import contextlib
import gc
import json
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ltx.checkpoints.files import SafetensorsFile, TensorInfo
from mlx_ltx.errors import UserError

WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_file_is_read(path):
    mx.save_safetensors(str(path), {"a": mx.ones((2, 3)), "b": mx.zeros((4,), mx.bfloat16)}, {"config": '{"x": 1}'})
    file = SafetensorsFile(path)
    assert file.tensors == {"a": TensorInfo("F32", (2, 3), 24), "b": TensorInfo("BF16", (4,), 8)}
    assert file.tensors["a"].size == 6
    assert file.config == {"x": 1}
    assert mx.array_equal(file.arrays["a"], mx.ones((2, 3)))


def test_scalars_and_empty_tensors_are_read(path):
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    file = SafetensorsFile(write(path, header, bytes(4)))
    assert file.tensors["scalar"].size == 1
    assert file.tensors["empty"].size == 0


def test_a_truncated_file_says_how_much_is_missing(path):
    write(path, {"w": WEIGHT}, bytes(24))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert "truncated, 5 bytes are missing; download it again" in refused(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_file_cut_off_in_its_header(path, size):
    write(path, {"w": WEIGHT}, bytes(24))
    path.write_bytes(path.read_bytes()[:size])
    assert "not a safetensors file, or its download was cut off" in refused(path)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>Access denied</html>" * 10,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 46149345334\n",
        b"GGUF" + bytes(100),
        b"PK\x03\x04" + bytes(100),
    ],
    ids=["html", "lfs-pointer", "gguf", "zip"],
)
def test_something_else_is_not_safetensors(path, content):
    path.write_bytes(content)
    assert "not a safetensors file" in refused(path)


@pytest.mark.parametrize("header", [b"\xff\xfe not text", b"not json", b"[1, 2]", b"3", b'"text"', b"null"])
def test_a_header_that_is_no_table(path, header):
    assert "not a safetensors file" in refused(write(path, header, bytes(24)))


@pytest.mark.parametrize(
    "entry",
    [
        {**WEIGHT, "data_offsets": [0]},
        {**WEIGHT, "data_offsets": ["a", "b"]},
        {**WEIGHT, "shape": 6},
        {**WEIGHT, "shape": ["x", "y"]},
        {**WEIGHT, "shape": None},
        {**WEIGHT, "shape": [float("inf")]},
        {"dtype": "F32", "shape": [6]},
        "text",
        None,
        24,
    ],
    ids=repr,
)
def test_a_damaged_entry(path, entry):
    assert "not a safetensors file" in refused(write(path, {"w": entry}, bytes(24)))


@pytest.mark.parametrize(
    "entry",
    [
        {**WEIGHT, "shape": [2, 4]},
        {**WEIGHT, "data_offsets": [0, 20]},
        {**WEIGHT, "data_offsets": [24, 0]},
        {**WEIGHT, "data_offsets": [-24, 0]},
        {**WEIGHT, "shape": [-2, -3]},
        {**WEIGHT, "dtype": "F64"},
    ],
    ids=repr,
)
def test_damaged_offsets_name_the_tensor(path, entry):
    assert "damaged" in refused(write(path, {"w": entry}, bytes(24)))
    assert " w " in refused(path)


def test_metadata_of_an_unknown_form(path):
    assert "not a safetensors file" in refused(write(path, {"__metadata__": [1], "w": WEIGHT}, bytes(24)))


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(min_size=0, max_size=400), at=st.integers(0, 200))
def test_no_damage_raises_anything_but_a_user_error(tmp_path_factory, noise, at):
    path = write(tmp_path_factory.mktemp("fuzz") / "x.safetensors", {"w": WEIGHT, "v": WEIGHT}, bytes(24))
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    with contextlib.suppress(UserError):
        SafetensorsFile(path)


def test_a_missing_file_and_a_folder(tmp_path):
    assert "No such file" in refused(tmp_path / "nothing.safetensors")
    assert "directory" in refused(tmp_path)


def test_an_unreadable_dtype_is_told_when_arrays_are_wanted(path):
    file = SafetensorsFile(write(path, {"w": {**WEIGHT, "dtype": "F4", "data_offsets": [0, 3]}}, bytes(24)))
    with pytest.raises(UserError, match="cannot be loaded"):
        _ = file.arrays["w"]


def test_reading_the_header_reads_no_data(path):
    mx.save_safetensors(str(path), {"w": mx.zeros((1 << 22,))})
    mx.clear_cache()
    gc.collect()
    before = mx.get_active_memory()
    array = SafetensorsFile(path).arrays["w"]
    assert mx.get_active_memory() - before < 1 << 16
    mx.eval(array)
    assert mx.get_active_memory() - before >= 1 << 24


def test_arrays_are_not_kept_after_use(path):
    mx.save_safetensors(str(path), {name: mx.ones((1 << 20,)) for name in ("a", "b")})
    file = SafetensorsFile(path)
    gc.collect()
    before = mx.get_active_memory()
    array = file.arrays["a"].astype(mx.bfloat16)
    mx.eval(array)
    assert mx.get_active_memory() - before < 3 << 20  # the bfloat16 copy alone
    del array
    assert mx.get_active_memory() - before < 1 << 16


def test_arrays_can_be_had_again_and_iterated(path):
    mx.save_safetensors(str(path), {"a": mx.ones((2,)), "b": mx.zeros((3,))})
    arrays = SafetensorsFile(path).arrays
    for _ in range(2):
        assert mx.array_equal(arrays["a"], mx.ones((2,)))
    assert {name: array.shape for name, array in arrays.items()} == {"a": (2,), "b": (3,)}
    assert len(arrays) == 2
    assert "a" in arrays
    assert "c" not in arrays
    with pytest.raises(KeyError):
        _ = arrays["c"]


def test_config_and_version(path):
    def read(**metadata: str) -> SafetensorsFile:
        return SafetensorsFile(write(path, {"__metadata__": metadata}))

    assert read(config='{"transformer": {}}').config == {"transformer": {}}
    for bad in ({}, {"config": "no json"}, {"config": "[1]"}):
        with pytest.raises(UserError, match="no model config"):
            _ = read(**bad).config
    for text, version in (
        ("2.3.0", (2, 3, 0)),
        ('"2.3.0"', (2, 3, 0)),
        ("2.5.0-beta", (2, 5, 0)),
        ("2.5-1.rc", (2, 5, 1)),
        ("2.3", (2, 3)),
    ):
        assert read(model_version=text).version == version
    assert read().version == (2, 0)
    assert read(a="text", b="[1, 2]").json_metadata("a") == "text"
    assert read(a="text", b="[1, 2]").json_metadata("b") == [1, 2]
