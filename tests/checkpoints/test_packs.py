"""Saved packs: what they hold, that they come back bit for bit, and every way in which writing or reading can fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_ltx.checkpoints import __main__ as command
from mlx_ltx.checkpoints import components, packs
from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.checkpoints.files import INDEX, SafetensorsFile
from mlx_ltx.checkpoints.packs import Pack, is_pack_folder, open_checkpoint, write_pack
from mlx_ltx.checkpoints.quantize import Quantization
from mlx_ltx.checkpoints.recognise import is_checkpoint, is_gemma_folder
from mlx_ltx.checkpoints.resolve import resolve_model
from mlx_ltx.errors import UserError

FP8 = Path(__file__).parents[1] / "golden" / "transformer_23_fp8.ckpt.safetensors"
SETTING = Quantization.parse("q4", 32)
DIT = "model.diffusion_model."


def write(source: SafetensorsFile | Path, folder: Path, setting: Quantization = SETTING) -> Pack:
    file = source if isinstance(source, SafetensorsFile) else SafetensorsFile(source)
    for _ in write_pack(file, folder, setting):
        pass
    return Pack(folder)


def demo_file():
    return demo_folder() / "ltx-2.3-demo.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "ltx-2.3-demo-q4"
    write(demo_file(), folder)
    return folder


@pytest.fixture
def pack(made, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "pack"))


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = parameters(a), parameters(b)
    return one.keys() == other.keys() and all(
        one[path].dtype == other[path].dtype and mx.array_equal(one[path], other[path], equal_nan=True) for path in one
    )


def left_over(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Writing and reading


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("name", ["q8", "q6", "q5", "q4", "mxfp8", "mxfp4", "nvfp4"])
def test_a_pack_comes_back_as_quantised_on_load(tmp_path, name, dtype):
    setting = Quantization.parse(name, 32 if name.startswith("q") else None)
    reloaded = components.load_transformer(write(demo_file(), tmp_path / name, setting), dtype)
    on_load = components.load_transformer(SafetensorsFile(demo_file()), dtype, quantization=setting)
    assert same(reloaded, on_load)
    assert any(isinstance(layer, nn.QuantizedLinear) for _, layer in reloaded.named_modules())


def test_an_fp8_checkpoint_as_a_pack(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "what_else", lambda source: None)  # it has no VAEs
    source = SafetensorsFile(FP8)
    pack = write(source, tmp_path / "pack")
    assert not any(key.endswith(("weight_scale", "input_scale")) for key in pack.tensors)
    assert pack.tensors[f"{DIT}transformer_blocks.1.attn1.to_gate_logits.weight"].dtype == "BF16"
    on_load = components.load_transformer(source, quantization=SETTING)
    assert same(components.load_transformer(pack), on_load)


def test_a_pack_holds_everything_else_as_it_was(made):
    source, pack = SafetensorsFile(demo_file()), Pack(made)
    kept = source.tensors.keys() & pack.tensors.keys()
    packed = {key.removesuffix(".scales") for key in pack.tensors if key.endswith(".scales")}
    assert source.tensors.keys() - kept == set()
    assert pack.tensors.keys() - kept == {f"{key}.{name}" for key in packed for name in ("scales", "biases")}
    for key in kept - {f"{layer}.weight" for layer in packed}:
        assert pack.tensors[key] == source.tensors[key]
        assert mx.array_equal(pack.arrays[key], source.arrays[key]), key
    gemma = type("Config", (), {"hidden_size": 64, "hidden_states": 5})()
    for load in ("load_connectors", "load_video_encoder", "load_video_decoder", "load_audio_encoder"):
        function = getattr(components, load)
        assert same(function(pack, mx.float32), function(source, mx.float32)), load
    assert same(components.load_audio_decoder(pack, mx.float32), components.load_audio_decoder(source, mx.float32))
    assert same(components.load_vocoder(pack)[0], components.load_vocoder(source)[0])
    features = [components.load_text_features(file, gemma, mx.float32) for file in (pack, source)]
    assert same(*features)


def test_metadata_come_along(made):
    source, pack = SafetensorsFile(demo_file()), Pack(made)
    assert pack.config == source.config
    assert pack.version == source.version == (2, 3, 0)
    assert pack.metadata["license"] == source.metadata["license"]
    assert pack.origin == demo_file().name
    assert is_checkpoint(pack)


def test_the_files_are_those_of_mlx_lm(made):
    assert left_over(made) == ["config.json", "model-00001-of-00001.safetensors", INDEX]
    config = json.loads((made / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    usual = {key: value for key, value in config["quantization"].items() if not isinstance(value, dict)}
    assert usual == {"mode": "affine", "bits": 4, "group_size": 32}
    exceptions = config["quantization"][f"{DIT}transformer_blocks.0.attn1.to_q"]
    assert exceptions == {"mode": "affine", "bits": 8, "group_size": 32}
    index = json.loads((made / INDEX).read_text())
    pack = Pack(made)
    assert set(index["weight_map"]) == set(pack.tensors)
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in pack.tensors.values())
    loaded = mx.load(str(made / "model-00001-of-00001.safetensors"))  # by MLX's own reader
    assert loaded.keys() == pack.tensors.keys()


def test_shards_stay_below_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "MAX_SHARD_BYTES", 500_000)
    pack = write(demo_file(), tmp_path / "pack")
    sizes = [shard.path.stat().st_size for shard in pack.shards]
    assert 8 < len(sizes) < 20
    assert pack.shards[2].path.name == f"model-00003-of-{len(sizes):05}.safetensors"
    for shard in pack.shards:
        data = sum(info.nbytes for info in shard.tensors.values())
        assert data <= 500_000 or len(shard.tensors) == 1
    on_load = components.load_transformer(SafetensorsFile(demo_file()), quantization=SETTING)
    assert same(components.load_transformer(pack), on_load)


def test_tensors_that_are_shared_out():
    assert packs._shards({"a": 4_000_000_000, "b": 1_000_000_000, "c": 1}) == [["a", "b"], ["c"]]
    assert packs._shards({"a": 1, "b": 9_000_000_000, "c": 1}) == [["a"], ["b"], ["c"]]


def test_progress_counts_every_byte(tmp_path):
    seen = list(write_pack(SafetensorsFile(demo_file()), tmp_path / "pack", SETTING))
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == seen[-1].total == sum(info.nbytes for info in Pack(tmp_path / "pack").tensors.values())


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    source = SafetensorsFile(demo_file())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write(source, tmp_path / "pack")
    largest = max(info.nbytes for info in source.tensors.values())
    whole = sum(info.nbytes for info in source.tensors.values())
    assert mx.get_peak_memory() - before < 3 * largest < whole / 2


# --model


def test_model_takes_the_folder(made, no_hub, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "my-v2.3-pack"))
    shutil.copytree(demo_folder() / "gemma", folder / "gemma")
    shutil.copy(demo_folder() / "spatial-upscaler-x2.safetensors", folder)
    for spec in (folder, tmp_path):
        if spec == tmp_path:  # the pack lies one level down, and its companions beside it
            (folder / "gemma").rename(tmp_path / "gemma")
            (folder / "spatial-upscaler-x2.safetensors").rename(tmp_path / "up.safetensors")
        files = resolve_model(str(spec))
        assert (files.name, files.checkpoint) == ("my-v2.3-pack", folder)
        assert files.text_encoder.name == "gemma"
        assert files.spatial_upsampler is not None
        assert isinstance(open_checkpoint(files.checkpoint), Pack)
    assert not is_gemma_folder(folder)
    with pytest.raises(UserError, match=r"is one shard of a pack; give its folder"):
        resolve_model(str(folder / "model-00001-of-00001.safetensors"))


@pytest.mark.parametrize(
    ("origin", "distilled"), [("ltx-2.3-22b-distilled.safetensors", True), ("dev.safetensors", False)]
)
def test_what_it_was_made_from_chooses_the_pipeline(pack, no_hub, origin, distilled):
    config = json.loads((pack / "config.json").read_text()) | {"origin": origin}
    (pack / "config.json").write_text(json.dumps(config))
    shutil.copytree(demo_folder() / "gemma", pack / "gemma")
    assert resolve_model(str(pack)).distilled is distilled


def test_a_checkpoint_beside_a_pack_is_one_too_many(pack, no_hub):
    shutil.copy(demo_file(), pack / "other.safetensors")
    with pytest.raises(UserError, match="holds several checkpoints"):
        resolve_model(str(pack))


# What is refused


def test_nothing_is_overwritten(made, tmp_path):
    (tmp_path / "taken").mkdir()
    for taken in (made, tmp_path / "taken"):
        before = left_over(taken)
        with pytest.raises(UserError, match="already exists; give a new name"):
            write(demo_file(), taken)
        assert left_over(taken) == before


def test_what_is_quantised_is_not_quantised_again(made, tmp_path):
    with pytest.raises(UserError, match="already quantised"):
        write(Pack(made), tmp_path / "again")
    with pytest.raises(UserError, match=r"the transformer is already quantised \((4|8) bits, affine\)"):
        components.load_transformer(Pack(made), quantization=SETTING)
    with pytest.raises(UserError, match="already quantised"):
        write(made / "model-00001-of-00001.safetensors", tmp_path / "shard")
    assert left_over(tmp_path) == []


def test_only_whole_checkpoints_become_packs(tmp_path):
    with pytest.raises(UserError, match="looks like a latent upsampler"):
        write(demo_folder() / "spatial-upscaler-x2.safetensors", tmp_path / "pack")
    loaded = mx.load(str(demo_file()))
    del loaded[f"{DIT}transformer_blocks.1.attn1.to_q.weight"]
    mx.save_safetensors(str(tmp_path / "torn.safetensors"), loaded, SafetensorsFile(demo_file()).metadata)
    with pytest.raises(UserError, match=r"1 missing \(blocks.1.video.attn1.to_q.weight\)"):
        write(tmp_path / "torn.safetensors", tmp_path / "pack")
    assert left_over(tmp_path) == ["torn.safetensors"]


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0.1 GB, but only 0.0 GB are free there"):
        write(demo_file(), tmp_path / "new" / "pack")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("at", [0, 200])
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch, at):
    whole = packs.write_array
    written = []

    def full(file, array):
        if len(written) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(array.nbytes)
        return whole(file, array)

    monkeypatch.setattr(packs, "write_array", full)
    with pytest.raises(UserError, match="the disk is full; nothing was kept") as caught:
        write(demo_file(), tmp_path / "pack")
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == []


def test_stopping_leaves_nothing_behind(tmp_path):
    steps = write_pack(SafetensorsFile(demo_file()), tmp_path / "pack", SETTING)
    next(steps)
    assert len(left_over(tmp_path)) == 1
    steps.close()
    assert left_over(tmp_path) == []


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


LAYER = f"{DIT}transformer_blocks.1.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization"].pop(LAYER), "of another shape"),
        (lambda c: c["quantization"].update({LAYER: {"bits": 3, "group_size": 32}}), "to_q.weight is"),
        (lambda c: c["quantization"].update({LAYER: {"bits": 7}}), "quantization is not supported: bits 7"),
        (lambda c: c["quantization"].update({LAYER: {"mode": "mxfp8"}}), r"1 unexpected \(.*to_q.biases\)"),
        (
            lambda c: c["quantization"].update({f"{DIT}patchify_proj": {"bits": 4}}),
            r"config.json and tensors disagree: 1 layers are not quantised \(model.diffusion_model.patchify_proj\)",
        ),
        (lambda c: c["quantization"].pop("bits"), "has no quantization with its bits"),
        (lambda c: c.pop("quantization"), "says nothing about quantization"),
        (lambda c: c.update(quantization="q4"), "says nothing about quantization"),
        (lambda c: c.pop("config"), "carries no model config"),
        (lambda c: c["config"]["transformer"].update(num_layers=4), "missing"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors(pack, change, message):
    change_config(pack, change)
    with pytest.raises(UserError, match=message) as caught:
        components.load_transformer(Pack(pack))
    assert "\n" not in str(caught.value)


def test_tensors_that_disagree_with_the_config(pack):
    shard = pack / "model-00001-of-00001.safetensors"
    loaded = mx.load(str(shard))
    plain = {key: value for key, value in loaded.items() if not key.endswith((".scales", ".biases"))}
    mx.save_safetensors(str(shard), plain)
    with pytest.raises(UserError, match="no tensor is quantised"):
        Pack(pack)
    mx.save_safetensors(str(shard), {key: value for key, value in loaded.items() if key != f"{LAYER}.biases"})
    with pytest.raises(UserError, match=r"1 tensors of its index are missing, first .*to_q.biases"):
        Pack(pack)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated, 10 bytes"):
        Pack(pack)
    shard.unlink()
    with pytest.raises(UserError, match="1 of 1 shards are missing"):
        Pack(pack)


def test_what_is_no_pack(tmp_path):
    assert not is_pack_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert not is_pack_folder(tmp_path)
    with pytest.raises(UserError, match="not a JSON object"):
        Pack(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_pack_folder(tmp_path)
    with pytest.raises(UserError, match="not JSON"):
        Pack(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "quantization": {"bits": 4}}))
    assert not is_pack_folder(tmp_path)


# The command


def test_the_command(tmp_path, capsys):
    target = tmp_path / "pack"
    assert command.main(["quantize", "demo", str(target), "--quantize", "q4", "--group-size", "32"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}: 6 MB, q4\n"
    assert 10 <= len(err.splitlines()) <= 20
    assert err.splitlines()[-1] == "6 MB of 6 MB, shard 1 of 1"
    assert same(
        components.load_transformer(Pack(target)),
        components.load_transformer(SafetensorsFile(demo_file()), quantization=SETTING),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["demo", "{taken}", "--quantize", "q4"], "already exists"),
        (["demo", "{new}", "--quantize", "q3"], "--quantize q3: no such setting"),
        (["demo", "{new}", "--quantize", "mxfp4", "--group-size", "64"], "--group-size 64"),
        (["nowhere", "{new}", "--quantize", "q4"], "nowhere: there is no such file or folder"),
        (["{taken}", "{new}", "--quantize", "q4"], "holds no LTX-2 checkpoint"),
        (["{file}", "{new}", "--quantize", "q4"], "not a safetensors file"),
        (["ltx-2.3-dev", "{new}", "--quantize", "q4"], "not on this machine yet"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, no_hub, flags, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_bytes(b"x" * 20)
    places = {"taken": tmp_path / "taken", "new": tmp_path / "new", "file": tmp_path / "file"}
    assert command.main(["quantize", *(flag.format(**places) for flag in flags)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert left_over(tmp_path) == ["file", "taken"]
