"""A model in the official layout, large enough to be measured, and the comparison with what was predicted."""

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import make_demo
from demo_weights.autoencoders import put_audio_vae, put_upsampler, put_video_vae
from demo_weights.diffusion import put_connectors, put_transformer
from demo_weights.tensors import Tensors, save
from demo_weights.text import gemma_config, put_gemma, save_tokenizer, write_json
from demo_weights.vocoder import put_vocoder
from mlx_ltx.events import MemorySeen
from mlx_ltx.memory.plan import size_text
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.predict import make_plan

HEADS, VIDEO_HEAD, AUDIO_HEAD = 8, 64, 32
TOLERANCE = 0.15
# Where all of a phase is less than the buffers that MLX happens to have in flight, a ratio says nothing.
SLACK = 8 << 20
# How far reading runs ahead of converting is the system's affair; the plan counts a whole block of the file.
BLOCK_READ = 8 << 20
GEMMA = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@pytest.fixture(scope="session")
def middle_model(tmp_path_factory) -> Path:
    """A folder with a checkpoint of 0.1 GB, its text model and its upsampler."""
    folder = tmp_path_factory.mktemp("models") / "middle"
    config = copy.deepcopy(make_demo.CONFIG)
    transformer, vae = config["transformer"], config["vae"]
    for prefix, head in (("", VIDEO_HEAD), ("audio_", AUDIO_HEAD)):
        transformer[f"{prefix}num_attention_heads"] = transformer[f"{prefix}connector_num_attention_heads"] = HEADS
        transformer[f"{prefix}attention_head_dim"] = transformer[f"{prefix}connector_attention_head_dim"] = head
        transformer[f"{prefix}cross_attention_dim"] = HEADS * head
    transformer["caption_channels"] = GEMMA["hidden_size"]
    vae["decoder_base_channels"] = 24
    t = Tensors(1)
    put_transformer(t, transformer)
    put_connectors(t, transformer, GEMMA["hidden_size"] * (GEMMA["num_hidden_layers"] + 1))
    put_video_vae(t, vae)
    put_audio_vae(t, config["audio_vae"])
    put_vocoder(t, config["vocoder"])
    metadata = {"model_version": "2.3.0", "config": json.dumps(config)}
    save(folder / "ltx-2.3-distilled-middle.safetensors", t.values, metadata, make_demo.keeps_float32)
    t = Tensors(1)
    upsampler = {**make_demo.UPSAMPLER_CONFIG, "mid_channels": 128}
    put_upsampler(t, upsampler)
    save(folder / make_demo.UPSAMPLER, t.values, {"model_version": "2.3.0", "config": json.dumps(upsampler)})
    t = Tensors(1)
    put_gemma(t, gemma_config(GEMMA))
    save(folder / "gemma" / "model.safetensors", t.values, {"format": "pt"})
    write_json(folder / "gemma" / "config.json", gemma_config(GEMMA))
    save_tokenizer(folder / "gemma")
    return folder


@pytest.fixture
def wrongly_predicted() -> Callable[[Job], list[str]]:
    """Runs a job; gives the phases whose peak of MLX's memory is not what the plan says."""

    def compare(job: Job) -> list[str]:
        predicted = make_plan(job).phases
        gc.collect()  # what other tests left must not be freed while it is counted
        mx.clear_cache()
        before = mx.get_active_memory()
        seen = [event for event in job.run() if isinstance(event, MemorySeen)]
        assert [phase.name for phase in predicted] == [event.phase for event in seen]
        peaks = [event.peak_bytes - before for event in seen]
        return [
            f"{phase.name}: {size_text(phase.peak_bytes)} predicted, {size_text(peak)} measured"
            for phase, peak in zip(predicted, peaks, strict=True)
            if abs(phase.peak_bytes - peak) > max(TOLERANCE * peak, SLACK + BLOCK_READ * ("load" in phase.name))
        ]

    return compare
