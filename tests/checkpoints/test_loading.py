"""Strict loading: every key, shape, dtype and layout is checked, nothing is read before it is needed."""

from __future__ import annotations

import gc
import json
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_ltx.checkpoints import keymaps
from mlx_ltx.checkpoints.files import SafetensorsFile, TensorInfo
from mlx_ltx.checkpoints.keymaps import KeyMap
from mlx_ltx.checkpoints.loading import check_tensors, load_weights, published_axes, published_shapes
from mlx_ltx.errors import UserError

KEYS = Path(__file__).parents[1] / "golden" / "keys"
MAP = KeyMap(name="toy network", roots=("toy.",), parts={"encoder.": "", "stats.": "statistics."})


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = mx.zeros((4,))


class Toy(nn.Module):
    """One of each owner of weights whose layout differs between PyTorch and MLX, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 3, 5)
        self.plane = nn.Conv2d(2, 3, (5, 7))
        self.volume = nn.Conv3d(2, 3, (3, 5, 7))
        self.up = nn.ConvTranspose1d(2, 3, 5)
        self.blocks = [nn.Linear(6, 7, bias=False)]
        self.table = mx.zeros((2, 3, 4))
        self.statistics = Statistics()


SHAPES = {
    "toy.encoder.line.weight": (3, 2, 5),
    "toy.encoder.line.bias": (3,),
    "toy.encoder.plane.weight": (3, 2, 5, 7),
    "toy.encoder.plane.bias": (3,),
    "toy.encoder.volume.weight": (3, 2, 3, 5, 7),
    "toy.encoder.volume.bias": (3,),
    "toy.encoder.up.weight": (2, 3, 5),
    "toy.encoder.up.bias": (3,),
    "toy.encoder.blocks.0.weight": (7, 6),
    "toy.encoder.table": (2, 3, 4),
    "toy.stats.mean": (4,),
}


def tensors(dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    mx.random.seed(0)
    return {key: mx.random.normal(shape).astype(dtype) for key, shape in SHAPES.items()}


def save(folder: Path, arrays: dict[str, mx.array]) -> SafetensorsFile:
    path = folder / "toy.safetensors"
    mx.save_safetensors(str(path), arrays)
    return SafetensorsFile(path)


def refused(file: SafetensorsFile, module: nn.Module | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(module or Toy(), file, MAP)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_weight_arrives_in_the_layout_of_its_owner(tmp_path):
    arrays = tensors()
    model = load_weights(Toy(), save(tmp_path, arrays | {"other.weight": mx.ones((1,))}), MAP)
    for name, axes in (
        ("line", (0, 2, 1)),
        ("plane", (0, 2, 3, 1)),
        ("volume", (0, 2, 3, 4, 1)),
        ("up", (1, 2, 0)),
    ):
        weight = getattr(model, name).weight
        assert mx.array_equal(weight, arrays[f"toy.encoder.{name}.weight"].transpose(axes)), name
    assert mx.array_equal(model.blocks[0].weight, arrays["toy.encoder.blocks.0.weight"])
    assert mx.array_equal(model.table, arrays["toy.encoder.table"])
    assert mx.array_equal(model.statistics.mean, arrays["toy.stats.mean"])
    assert not model.training


def test_the_owner_decides_the_layout_not_the_shape():
    # A cube-shaped Linear-like table and a convolution with equal sizes cannot be told apart by shape.
    conv, transposed = nn.Conv1d(3, 3, 3), nn.ConvTranspose1d(3, 3, 3)
    assert published_axes(conv, "weight") == (0, 2, 1)
    assert published_axes(transposed, "weight") == (1, 2, 0)
    assert published_axes(conv, "bias") is None
    assert published_axes(nn.Linear(3, 3), "weight") is None
    assert published_axes(nn.ConvTranspose2d(2, 3, 3), "weight") == (1, 2, 3, 0)
    assert published_axes(nn.ConvTranspose3d(2, 3, 3), "weight") == (1, 2, 3, 4, 0)


def test_published_shapes_are_those_of_the_file():
    shapes = {MAP.path(key, "toy."): shape for key, shape in SHAPES.items()}
    assert published_shapes(Toy()) == shapes


def test_a_loaded_convolution_computes_what_pytorch_would(tmp_path):
    conv = load_weights(
        nn.Conv1d(1, 1, 2), save(tmp_path, {"w.weight": mx.array([[[1.0, 10.0]]]), "w.bias": mx.array([0.5])}),
        KeyMap(name="convolution", roots=("w.",)),
    )  # fmt: skip
    assert conv(mx.array([[[1.0], [2.0], [3.0]]])).flatten().tolist() == [21.5, 32.5]


def test_missing_tensors_are_counted_and_named(tmp_path):
    arrays = tensors()
    del arrays["toy.encoder.blocks.0.weight"], arrays["toy.stats.mean"]
    message = refused(save(tmp_path, arrays))
    assert "toy.safetensors: the toy network does not match its config" in message
    assert "2 missing (blocks.0.weight, statistics.mean)" in message


def test_unexpected_tensors_are_counted_and_named(tmp_path):
    arrays = tensors() | {"toy.encoder.blocks.1.weight": mx.ones((7, 6)), "toy.encoder.gate": mx.ones((1,))}
    assert "2 unexpected (blocks.1.weight, gate)" in refused(save(tmp_path, arrays))


def test_misshaped_tensors_are_named_with_both_shapes(tmp_path):
    arrays = tensors() | {"toy.encoder.blocks.0.weight": mx.ones((6, 7))}
    assert "1 of another shape (blocks.0.weight is [6, 7], not [7, 6])" in refused(save(tmp_path, arrays))


def test_an_already_transposed_convolution_is_refused(tmp_path):
    arrays = tensors()
    arrays["toy.encoder.plane.weight"] = arrays["toy.encoder.plane.weight"].transpose(0, 2, 3, 1)
    assert "plane.weight is [3, 5, 7, 2], not [3, 2, 5, 7]" in refused(save(tmp_path, arrays))


def test_long_lists_are_cut_short(tmp_path):
    message = refused(save(tmp_path, {"toy.encoder.table": mx.zeros((2, 3, 4))}))
    assert "10 missing (blocks.0.weight, line.bias, line.weight, …)" in message


def test_a_file_without_the_network(tmp_path):
    assert refused(save(tmp_path, {"x": mx.ones((1,))})).endswith("holds no toy network")


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("U8", 1), ("I32", 4)])
def test_quantised_and_integer_weights_are_refused_by_name(tmp_path, dtype, size):
    arrays = tensors()
    header, data = {}, b""
    for key, shape in SHAPES.items():
        raw = bytes(arrays[key].size * size) if key == "toy.encoder.blocks.0.weight" else bytes(memoryview(arrays[key]))
        kind = dtype if key == "toy.encoder.blocks.0.weight" else "F32"
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path = tmp_path / "toy.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    message = refused(SafetensorsFile(path))
    assert f"tensor toy.encoder.blocks.0.weight is {dtype}" in message


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dtypes_are_kept_or_cast(tmp_path, dtype):
    file = save(tmp_path, tensors(mx.bfloat16))
    for kept in (None, dtype):
        model = load_weights(Toy(), file, MAP, dtype=kept)
        assert {value.dtype for _, value in tree_flatten(model.parameters())} == {kept or mx.bfloat16}


def test_parts_can_be_left_out_on_purpose(tmp_path):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [nn.Linear(6, 7, bias=False)]

    file = save(tmp_path, tensors())
    assert "unexpected" in refused(file, Small())
    model = load_weights(Small(), file, MAP, skip=("line.", "plane.", "volume.", "up.", "table", "statistics."))
    assert model.blocks[0].weight.shape == (7, 6)


def test_loading_reads_nothing_until_it_is_evaluated(tmp_path):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(1024, 4096, bias=False)
            self.two = nn.Linear(1024, 4096, bias=False)

    file = save(tmp_path, {f"toy.encoder.{name}.weight": mx.ones((4096, 1024)) for name in ("one", "two")})
    model = Wide()
    gc.collect()
    before = mx.get_active_memory()
    load_weights(model, file, MAP, dtype=mx.bfloat16)
    assert mx.get_active_memory() - before < 1 << 16
    mx.eval(model.one.parameters())
    assert 7 << 20 < mx.get_active_memory() - before < 12 << 20


def test_building_a_module_of_full_size_costs_no_memory():
    before = mx.get_active_memory()
    shapes = published_shapes(nn.Linear(1 << 20, 1 << 20, bias=False))
    assert shapes == {"weight": (1 << 20, 1 << 20)}
    assert mx.get_active_memory() - before < 1 << 16


def test_check_tensors_accepts_exactly_the_right_set():
    found = {MAP.path(key, "toy."): TensorInfo("F32", shape, 0) for key, shape in SHAPES.items()}
    check_tensors(Toy(), found, "source", "toy")
    with pytest.raises(UserError):
        check_tensors(Toy(), dict(list(found.items())[1:]), "source", "toy")


def test_key_maps_prefer_the_first_root_that_occurs():
    nested = KeyMap(name="n", roots=("vae.", ""), parts={"encoder.": ""})
    assert nested.select(["vae.encoder.a", "encoder.b"]) == {"a": "vae.encoder.a"}
    assert nested.select(["encoder.b", "decoder.c"]) == {"b": "encoder.b"}
    assert nested.select(["other"]) == {}


def test_key_maps_exclude_rename_and_leave_unused_keys():
    chosen = KeyMap(
        name="n", roots=("r.",), exclude=("not_mine.",), renames=((r"\bto_out\.0\.", "to_out."),), unused=(r"junk\d",)
    )
    keys = ["r.a.to_out.0.weight", "r.not_mine.x", "r.junk1", "r.junkish", "s.a"]
    assert chosen.select(keys) == {"a.to_out.weight": "r.a.to_out.0.weight", "junkish": "r.junkish"}
    assert chosen.path("s.a", "r.") is None


@pytest.mark.parametrize("name", ["19b", "2.3", "2.5"])
def test_the_transformer_map_owns_every_published_key_once(name):
    lines = (KEYS / f"{name}_transformer.txt").read_text().splitlines()
    keys = [line.split("\t")[0] for line in lines if line and not line.startswith("#")]
    extra = ["model.diffusion_model.video_embeddings_connector.learnable_registers", "vae.encoder.conv_in.weight"]
    selected = keymaps.TRANSFORMER.select([*keys, *extra])
    assert sorted(selected.values()) == sorted(keys)
    assert len(selected) == len(keys) > 3000
    assert keymaps.CONNECTORS.select([*keys, *extra]) == {"video.learnable_registers": extra[0]}


@pytest.mark.parametrize(
    ("keymap", "key", "path"),
    [
        (keymaps.VIDEO_ENCODER, "vae.encoder.conv_in.conv.weight", "conv_in.conv.weight"),
        (keymaps.VIDEO_ENCODER, "vae.per_channel_statistics.mean-of-means", "statistics.mean"),
        (keymaps.VIDEO_ENCODER, "vae.per_channel_statistics.channel", None),
        (keymaps.VIDEO_ENCODER, "vae.decoder.conv_in.conv.weight", None),
        (keymaps.VIDEO_DECODER, "vae.decoder.conv_in.conv.weight", "conv_in.conv.weight"),
        (keymaps.AUDIO_DECODER, "audio_vae.per_channel_statistics.std-of-means", "statistics.std"),
        (keymaps.VOCODER, "vocoder.vocoder.conv_pre.weight", "vocoder.conv_pre.weight"),
        (keymaps.VOCODER, "vocoder.mel_stft.stft_fn.inverse_basis", None),
    ],
)
def test_component_maps(keymap, key, path):
    assert keymap.path(key, keymap.roots[0]) == path
