"""What the plan says of the published LTX-2.3 on common Macs, from files that have its headers and nothing behind."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_ltx
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.pipelines.predict import make_fit

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = json.loads((GOLDEN / "real_configs.json").read_text())
PARTS = ("transformer", "connectors", "text_embedding_projection", "video_vae", "audio_vae", "vocoder")
UPSAMPLER = "23_spatial_x2_1.1"
GB = 1 << 30


def published(name: str) -> dict[str, list[int]]:
    """Key and shape of every tensor of a published part."""
    lines = (GOLDEN / "keys" / f"{name}.txt").read_text().splitlines()
    return {key: json.loads(shape) for key, shape in (line.split("\t") for line in lines if not line.startswith("#"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_hollow) -> Path:
    """LTX-2.3 (distilled), its upsampler and Gemma 3 12B, 71 GB in all."""
    folder = tmp_path_factory.mktemp("published")
    tensors = {key: shape for part in PARTS for key, shape in published(f"2.3_{part}").items()}
    metadata = {"config": json.dumps(CONFIGS["2.3"]), "model_version": "2.3.0"}
    write_hollow(folder / "ltx-2.3-22b-distilled.safetensors", tensors, metadata)
    metadata = {"config": json.dumps(CONFIGS["upsamplers"][UPSAMPLER])}
    write_hollow(folder / "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", published(f"upsampler_{UPSAMPLER}"), metadata)
    shutil.copytree(GOLDEN / "gemma3_tiny", folder / "gemma", ignore=shutil.ignore_patterns("*.safetensors"))
    write_hollow(folder / "gemma" / "model.safetensors", published("gemma3_12b"), {"format": "pt"})
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(48)]
    config = json.loads((folder / "gemma" / "config.json").read_text())
    config["text_config"] |= {
        "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 1024, "layer_types": kinds,
    }  # fmt: skip
    (folder / "gemma" / "config.json").write_text(json.dumps(config))
    yield folder
    shutil.rmtree(folder)  # small on this disk, but not for whoever copies it


def fit(folder: Path, tmp_path: Path, memory: int, **changes):
    request = mlx_ltx.Request(
        prompt="a lighthouse at dusk",
        model=str(folder),
        dtype="bfloat16",
        output=tmp_path / "a.mp4",
        cache=False,
        **changes,
    )
    return make_fit(prepare(request), memory)


@pytest.mark.parametrize(
    ("memory", "choices"),
    [
        (16 * GB, "--quantize-text q8 --weights streamed"),
        (32 * GB, "--quantize q8"),
        (64 * GB, ""),
    ],
)
def test_five_seconds_of_1536x1024_fit_any_mac(folder, tmp_path, memory, choices):
    before = mx.get_active_memory()
    chosen = fit(folder, tmp_path, memory)
    assert mx.get_active_memory() - before < 1 << 20
    assert (chosen.job.clip.width, chosen.job.clip.height, chosen.job.clip.frames) == (1536, 1024, 121)
    assert chosen.choices == choices
    assert chosen.plan.fits


def test_the_parts_are_as_large_as_published(folder, tmp_path):
    phases = {phase.name: phase for phase in fit(folder, tmp_path, 128 * GB).plan.phases}
    size = (folder / "ltx-2.3-22b-distilled.safetensors").stat().st_size
    transformer = phases["refine"].resident["transformer"]
    assert 0.8 * size < transformer < 0.9 * size
    text = (folder / "gemma" / "model.safetensors").stat().st_size
    assert 0.99 * text < phases["read-text"].peak_bytes < 1.05 * text  # the projection of images is left out
    assert transformer < phases["load-transformer"].peak_bytes < 1.02 * transformer


def test_4k_is_planned(folder, tmp_path):
    plan = fit(folder, tmp_path, 64 * GB, width=3840, height=2176, num_frames=121, weights="streamed").plan
    phases = {phase.name: phase for phase in plan.phases}
    decode = phases["decode-video"]
    assert decode.peak_bytes - sum(decode.resident.values()) < 8 * GB
    # 128 times the tokens of 512x256 in float16 would be 16 TB of attention logits; the work grows with the tokens.
    assert phases["refine"].peak_bytes < 48 * GB
