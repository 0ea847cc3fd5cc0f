"""From what a user types to files: names, paths, folders, repositories, and every way to be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub.file_download import repo_folder_name

from mlx_ltx.checkpoints import resolve
from mlx_ltx.checkpoints.catalogue import DEFAULT_TEXT_ENCODER, MODELS, TEXT_ENCODERS
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.hub import cached_snapshot, download
from mlx_ltx.checkpoints.recognise import is_spatial_upsampler, missing_gemma_files, what_else
from mlx_ltx.checkpoints.resolve import MissingFiles, best_model_on_disk, fits, models_on_disk, resolve_model
from mlx_ltx.errors import UserError

COMMIT = "1234567890123456789012345678901234567890"  # of the fake hub
GOLDEN = Path(__file__).parents[1] / "golden"
DIT = "model.diffusion_model."
CHECKPOINT_KEYS = (f"{DIT}patchify_proj.weight", f"{DIT}audio_patchify_proj.weight", "vae.encoder.conv_in.conv.weight")
CONFIG = {"transformer": {"_class_name": "AVTransformer3DModel"}}
DISTILLED = MODELS["ltx-2.3-distilled"]


def save(path: Path, keys: tuple[str, ...], config: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if config is None else {"config": json.dumps(config)}
    mx.save_safetensors(str(path), {key: mx.zeros((1,)) for key in keys}, metadata)
    return path


def checkpoint(path: Path, **transformer: object) -> Path:
    return save(path, CHECKPOINT_KEYS, {"transformer": CONFIG["transformer"] | transformer})


def upsampler(path: Path, scale: float = 2.0, **config: object) -> Path:
    whole = {"spatial_upsample": True, "temporal_upsample": False, "spatial_scale": scale, "mid_channels": 8} | config
    return save(path, ("initial_conv.weight", "final_conv.weight"), whole)


def gemma(folder: Path, model_type: str = "gemma3") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer.json").write_text("{}")
    save(folder / "model.safetensors", ("language_model.model.embed_tokens.weight",))
    return folder


def snapshot(cache: Path, repo: str) -> Path:
    """The folder of a repository's snapshot in the cache, as after a download."""
    folder = cache / repo_folder_name(repo_id=repo, repo_type="model")
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / ("0" * 40)


def cache_model(cache: Path, name: str, text_encoder: str | None = None) -> None:
    entry = MODELS[name]
    checkpoint(snapshot(cache, entry.checkpoint.repo) / entry.checkpoint.name)
    if entry.spatial_upsampler:
        upsampler(snapshot(cache, entry.spatial_upsampler.repo) / entry.spatial_upsampler.name)
    gemma(snapshot(cache, TEXT_ENCODERS[text_encoder or entry.text_encoder.name].repo))


@pytest.fixture
def models(tmp_path, no_hub):
    """A folder for local files; the hub's cache is empty and the hub out of reach."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def refused(spec: object, **overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(str(spec), **overrides)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, MissingFiles)
    return str(caught.value)


def missing(spec: object, **overrides: str) -> MissingFiles:
    with pytest.raises(MissingFiles) as caught:
        resolve_model(str(spec), **overrides)
    assert "\n" not in str(caught.value)
    return caught.value


# Names of the catalogue


def test_a_cached_model_is_found_by_name_and_alias(no_hub):
    cache_model(no_hub, "ltx-2.3-distilled")
    for name in ("ltx-2.3-distilled", "LTX-2.3", "ltx-2.3-22b-distilled-1.1"):
        files = resolve_model(name)
        assert files.name == "ltx-2.3-distilled"
        assert files.entry is DISTILLED
        assert files.checkpoint.name == DISTILLED.checkpoint.name
        assert files.spatial_upsampler.name == DISTILLED.spatial_upsampler.name
        assert files.text_encoder == snapshot(no_hub, DISTILLED.text_encoder.repo)
        assert files.distilled


def test_what_is_missing_comes_as_a_plan(no_hub):
    found = missing("ltx-2.3-distilled")
    assert found.plan.parts == (DISTILLED.checkpoint, DISTILLED.spatial_upsampler, DISTILLED.text_encoder)
    assert DISTILLED.checkpoint.name in str(found)
    assert "~61.4 GB to download" in str(found)
    checkpoint(snapshot(no_hub, DISTILLED.checkpoint.repo) / DISTILLED.checkpoint.name)
    rest = missing("ltx-2.3-distilled")
    assert rest.plan.cached == (True, False, False)
    assert DISTILLED.checkpoint.name not in str(rest)


def test_overrides_take_parts_out_of_the_plan(models):
    found = missing(
        "ltx-2.3-distilled",
        text_encoder=str(gemma(models / "gemma")),
        spatial_upsampler=str(upsampler(models / "up.safetensors")),
    )
    assert found.plan.parts == (DISTILLED.checkpoint,)
    assert "--text-encoder" not in str(found)


def test_any_gemma_of_the_catalogue_on_disk_will_do(no_hub):
    cache_model(no_hub, "ltx-2.3-dev", text_encoder="gemma-3-12b-4bit")
    files = resolve_model("ltx-2.3-dev")
    assert files.text_encoder == snapshot(no_hub, TEXT_ENCODERS["gemma-3-12b-4bit"].repo)
    assert files.spatial_upsampler is None
    wanted = missing("ltx-2.3-dev", text_encoder="gemma-3-12b-bf16")
    assert wanted.plan.cached == (True, False)
    assert wanted.plan.parts[1] is TEXT_ENCODERS["gemma-3-12b-bf16"]


def test_the_demo_is_its_folder(models, monkeypatch):
    checkpoint(models / "demo.safetensors", caption_channels=8)
    gemma(models / "gemma")
    upsampler(models / "up.safetensors")
    monkeypatch.setattr(resolve, "demo_folder", lambda: models)
    files = resolve_model("demo")
    assert (files.name, files.entry) == ("demo", MODELS["demo"])
    assert files.checkpoint == models / "demo.safetensors"
    assert files.text_encoder == models / "gemma"
    assert files.spatial_upsampler == models / "up.safetensors"


@pytest.mark.parametrize("typed", ["ltx2.3-distilled", "ltx-2.3-destilled"])
def test_misspelt_names_are_corrected(no_hub, typed):
    assert "did you mean ltx-2.3-distilled" in refused(typed)


def test_unknown_names_list_the_known_ones(no_hub):
    message = refused("sora")
    assert all(name in message for name in MODELS)


# The choice without a name


def test_without_a_name_the_best_on_disk_is_taken(no_hub, monkeypatch):
    monkeypatch.setattr(resolve, "total_memory", lambda: 128 << 30)
    cache_model(no_hub, "ltx-2-dev")
    assert resolve_model(None).name == "ltx-2-dev"
    cache_model(no_hub, "ltx-2.3-distilled")
    assert resolve_model(None).name == "ltx-2.3-distilled"
    monkeypatch.setattr(resolve, "total_memory", lambda: 32 << 30)
    assert best_model_on_disk(32 << 30) is None
    with pytest.raises(UserError, match=r"does not fit .* of this machine; try it .*--model ltx-2\.3-distilled"):
        resolve_model(None)


def test_without_anything_on_disk_the_first_of_the_catalogue_is_proposed(no_hub):
    assert models_on_disk() == []
    with pytest.raises(
        MissingFiles, match=r"^no model on this machine yet; ltx-2.3-distilled is .* to download$"
    ) as error:
        resolve_model(None)
    assert error.value.plan.title == "ltx-2.3-distilled"


def test_the_best_model_fits_and_is_complete(no_hub):
    assert best_model_on_disk(512 << 30) is None
    cache_model(no_hub, "ltx-2.3-distilled")
    cache_model(no_hub, "ltx-2-dev")
    assert [entry.name for entry in models_on_disk()] == ["ltx-2.3-distilled", "ltx-2-dev"]
    assert best_model_on_disk(64 << 30).name == "ltx-2.3-distilled"
    assert best_model_on_disk(48 << 30) is None
    (snapshot(no_hub, DISTILLED.spatial_upsampler.repo) / DISTILLED.spatial_upsampler.name).unlink()
    assert best_model_on_disk(64 << 30).name == "ltx-2-dev"
    (snapshot(no_hub, DEFAULT_TEXT_ENCODER.repo) / "tokenizer.json").unlink()
    assert best_model_on_disk(64 << 30) is None


def test_fitting_leaves_room():
    edge = int((DISTILLED.transformer_nbytes + resolve.HEADROOM_BYTES) / resolve.USABLE_FRACTION) + 1
    assert fits(DISTILLED, edge)
    assert not fits(DISTILLED, edge - 10)


# Local files and folders


def test_a_checkpoint_file_with_its_companions(models):
    path = checkpoint(models / "my-distilled.safetensors")
    gemma(models / "gemma-3-12b")
    upsampler(models / "upscalers" / "x2.safetensors")
    files = resolve_model(str(path))
    assert files.name == "my-distilled"
    assert files.checkpoint == path
    assert files.text_encoder == models / "gemma-3-12b"
    assert files.spatial_upsampler == models / "upscalers" / "x2.safetensors"
    assert files.entry is None
    assert files.distilled


def test_a_relative_path_and_the_home_folder(models, monkeypatch):
    checkpoint(models / "model.safetensors")
    gemma(models / "gemma")
    monkeypatch.chdir(models)
    assert resolve_model("model.safetensors").text_encoder == models / "gemma"
    monkeypatch.setenv("HOME", str(models))
    assert resolve_model("~/model.safetensors").checkpoint == models / "model.safetensors"
    assert resolve_model("~").checkpoint == models / "model.safetensors"


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_folder_is_searched_one_level_deep(models, place):
    path = checkpoint(models / place / "model.safetensors")
    gemma(models / "text")
    files = resolve_model(str(models))
    assert files.checkpoint == path
    assert files.text_encoder == models / "text"
    assert files.spatial_upsampler is None
    assert not files.distilled


def test_a_deeper_checkpoint_is_not_searched_for(models):
    checkpoint(models / "a" / "b" / "model.safetensors")
    assert refused(models) == f"--model {models}: holds no LTX-2 checkpoint"


def test_several_checkpoints_are_named(models):
    checkpoint(models / "b.safetensors")
    checkpoint(models / "sub" / "a.safetensors")
    assert "several checkpoints (b.safetensors, sub/a.safetensors)" in refused(models)


def test_loras_and_parts_in_a_folder_do_no_harm(models):
    path = checkpoint(models / "model.safetensors")
    save(models / "lora.safetensors", ("diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight",))
    save(models / "vae.safetensors", ("encoder.conv_in.conv.weight",))
    gemma(models / "gemma")
    assert resolve_model(str(models)).checkpoint == path


def test_nothing_there(models):
    for spec in ("/nowhere/model.safetensors", "./nothing", "~/nothing", "a/b/c", "model.safetensors"):
        assert refused(spec) == f"--model {spec}: there is nothing at that path"


def test_an_empty_folder_and_a_folder_of_something_else(models):
    assert refused(models) == f"--model {models}: holds no LTX-2 checkpoint"
    save(models / "flux.safetensors", ("double_blocks.0.img_attn.qkv.weight",))
    assert "flux.safetensors looks like a Flux checkpoint" in refused(models)


def test_a_truncated_checkpoint_in_a_folder_is_told(models):
    path = checkpoint(models / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert "1 bytes are missing; download it again" in refused(models)
    assert "1 bytes are missing; download it again" in refused(path)


def test_a_gemma_folder_is_no_model(models):
    assert "pass it with --text-encoder" in refused(gemma(models / "gemma"))


def test_other_file_types(models):
    (models / "model.gguf").write_bytes(b"GGUF")
    assert "only .safetensors checkpoints" in refused(models / "model.gguf")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        (f"{DIT}double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
        (f"{DIT}input_blocks.0.0.weight", "Stable Diffusion"),
        (f"{DIT}joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("blocks.0.self_attn.q.weight", "Wan"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
        (f"{DIT}patchify_proj.weight", "LTX-Video"),
        ("audio_proj_in.weight", "diffusers"),
        ("transformer_blocks.0.attn1.to_q.weight", "diffusers"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight", "LoRA"),
        ("initial_conv.weight", "latent upsampler"),
        ("model.layers.0.mlp.up_proj.weight", "language model"),
        ("vae.decoder.conv_in.conv.weight", "VAE"),
        ("x", "unknown kind"),
    ],
)
def test_checkpoints_of_other_families_are_recognised(models, key, family):
    path = save(models / "other.safetensors", (key,))
    message = refused(path)
    assert "not an LTX-2 checkpoint; it looks like a" in message
    assert family in message


def test_parts_of_ltx_checkpoints_are_told(models):
    assert "separate files" in refused(save(models / "dit.safetensors", CHECKPOINT_KEYS[:2], CONFIG))
    assert "lost its config" in refused(save(models / "bare.safetensors", CHECKPOINT_KEYS))


def test_real_files_are_recognised_as_they_are():
    for name in ("19b", "2.3", "2.5"):
        lines = (GOLDEN / "keys" / f"{name}_transformer.txt").read_text().splitlines()
        keys = {line.split("\t")[0] for line in lines}
        assert set(CHECKPOINT_KEYS[:2]) <= keys


# The text encoder


def test_without_gemma_the_catalogue_offers_one(models):
    path = checkpoint(models / "model.safetensors", caption_channels=3840)
    found = missing(path)
    assert found.plan.parts == (DEFAULT_TEXT_ENCODER,)
    assert "--text-encoder" in str(found)
    assert "~14.3 GB to download" in str(found)


def test_a_cached_gemma_is_used_with_a_local_checkpoint(models, no_hub):
    folder = gemma(snapshot(no_hub, TEXT_ENCODERS["gemma-3-12b-6bit"].repo))
    assert resolve_model(str(checkpoint(models / "model.safetensors"))).text_encoder == folder


def test_a_checkpoint_of_another_width_needs_its_own_gemma(models, no_hub):
    gemma(snapshot(no_hub, DEFAULT_TEXT_ENCODER.repo))
    path = checkpoint(models / "tiny.safetensors", caption_channels=32)
    assert "there is no Gemma folder with it; pass one with --text-encoder" in refused(path)


def test_several_gemma_folders_are_named(models):
    path = checkpoint(models / "model.safetensors")
    gemma(models / "one")
    gemma(models / "two")
    assert "several Gemma folders (one, two); choose one with --text-encoder" in refused(path)
    assert resolve_model(str(path), text_encoder=str(models / "two")).text_encoder == models / "two"


def test_incomplete_gemma_folders_name_what_is_missing(models):
    path = checkpoint(models / "model.safetensors")
    folder = gemma(models / "gemma")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    (folder / "tokenizer.json").unlink()
    message = refused(path)
    assert "lacks tokenizer.json, model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in message
    assert message == refused(path, text_encoder=str(folder))
    (folder / "model-00001-of-00003.safetensors").unlink()
    assert missing_gemma_files(folder) == ["tokenizer.json", "*.safetensors"]


def test_a_broken_link_in_the_cache_is_missing(models):
    folder = gemma(models / "gemma")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(models / "gone")
    assert missing_gemma_files(folder) == ["*.safetensors"]


def test_text_encoders_by_path_name_and_repository(models, no_hub):
    path = str(checkpoint(models / "model.safetensors"))
    folder = gemma(models / "text" / "gemma")
    assert resolve_model(path, text_encoder=str(models / "text")).text_encoder == folder
    entry = TEXT_ENCODERS["gemma-3-12b-4bit"]
    assert missing(path, text_encoder="gemma-3-12b-4bit").plan.parts == (entry,)
    assert missing(path, text_encoder=entry.repo).plan.parts == (entry,)
    cached = gemma(snapshot(no_hub, entry.repo))
    assert resolve_model(path, text_encoder=entry.repo.upper()).text_encoder == cached
    own = gemma(snapshot(no_hub, "someone/gemma-tuned"))
    assert resolve_model(path, text_encoder="someone/gemma-tuned").text_encoder == own


def test_wrong_text_encoders(models, no_hub):
    path = checkpoint(models / "model.safetensors")
    llama = gemma(models / "llama", model_type="llama")
    gemma(snapshot(no_hub, "someone/llama"), model_type="llama")
    assert "holds no Gemma 3 model" in refused(path, text_encoder=str(llama))
    assert "is not a Gemma 3 model" in refused(path, text_encoder="someone/llama")
    assert "is a file" in refused(path, text_encoder=str(path))
    assert "did you mean gemma-3-12b-4bit" in refused(path, text_encoder="gemma-12b-4bit")
    assert "the names are gemma-3-12b-8bit" in refused(path, text_encoder="t5")
    assert "no such folder" in refused(path, text_encoder="/nowhere/gemma")
    assert "cannot reach" in refused(path, text_encoder="someone/else")


def test_the_golden_gemma_is_a_gemma_folder(models):
    path = checkpoint(models / "tiny.safetensors", caption_channels=32)
    shutil.copytree(GOLDEN / "gemma3_tiny", models / "gemma")
    assert resolve_model(str(path)).text_encoder == models / "gemma"


# The upsampler


def test_the_doubling_upsampler_is_preferred(models):
    path = checkpoint(models / "model.safetensors")
    gemma(models / "gemma")
    upsampler(models / "x1.5.safetensors", 1.5)
    assert resolve_model(str(path)).spatial_upsampler == models / "x1.5.safetensors"
    upsampler(models / "x2.safetensors", 2.0)
    upsampler(models / "temporal.safetensors", spatial_upsample=False, temporal_upsample=True)
    assert resolve_model(str(path)).spatial_upsampler == models / "x2.safetensors"
    upsampler(models / "x2-new.safetensors", 2.0)
    message = refused(path)
    assert "x2-new.safetensors, x2.safetensors" in message
    assert "choose one with --spatial-upsampler" in message
    chosen = resolve_model(str(path), spatial_upsampler=str(models / "x2.safetensors"))
    assert chosen.spatial_upsampler == models / "x2.safetensors"


def test_wrong_upsamplers(models):
    path = checkpoint(models / "model.safetensors")
    gemma(models / "gemma")
    assert "there is no such file" in refused(path, spatial_upsampler="/nowhere.safetensors")
    assert "not a spatial latent upsampler" in refused(path, spatial_upsampler=str(path))
    temporal = upsampler(models / "t.safetensors", spatial_upsample=False, temporal_upsample=True)
    assert "not a spatial latent upsampler" in refused(path, spatial_upsampler=str(temporal))


def test_upsamplers_are_told_from_checkpoints(models):
    assert is_spatial_upsampler(SafetensorsFile(upsampler(models / "u.safetensors")))
    assert not is_spatial_upsampler(SafetensorsFile(checkpoint(models / "c.safetensors")))
    assert not is_spatial_upsampler(SafetensorsFile(save(models / "n.safetensors", ("initial_conv.weight",))))
    assert what_else(SafetensorsFile(models / "c.safetensors")) is None


# Repositories on the hub


@pytest.fixture
def published(hub, tmp_path):
    """A repository with one checkpoint and what often lies beside it."""
    path = checkpoint(tmp_path / "published.safetensors")
    hub.files["someone/tuned"] = {
        "tuned.safetensors": path.read_bytes(),
        "tuned-lora-64.safetensors": b"x",
        "spatial-upscaler.safetensors": b"y",
        "README.md": b"hello",
    }
    return hub


@pytest.mark.parametrize("spec", ["someone/tuned", "someone/tuned:tuned.safetensors"])
def test_a_repository_is_planned_downloaded_and_found(published, spec, tmp_path):
    found = missing(spec)
    size = len(published.files["someone/tuned"]["tuned.safetensors"])
    assert [(p.repo, p.nbytes) for p in found.plan.parts] == [
        ("someone/tuned", size),
        (DEFAULT_TEXT_ENCODER.repo, DEFAULT_TEXT_ENCODER.nbytes),
    ]
    assert found.plan.licences[0].url == f"{published.url}/someone/tuned"
    text = str(gemma(tmp_path / "gemma"))
    list(download(missing(spec, text_encoder=text).plan))
    published.requests.clear()
    files = resolve_model(spec, text_encoder=text)
    assert files.name == "tuned"
    assert files.checkpoint.read_bytes() == published.files["someone/tuned"]["tuned.safetensors"]
    assert published.requests == []


def test_a_catalogue_checkpoint_by_its_repository_is_the_catalogue_entry(no_hub):
    found = missing(f"{DISTILLED.checkpoint.repo}:{DISTILLED.checkpoint.name}")
    assert found.plan.title == "ltx-2.3-distilled"


def test_a_local_folder_wins_over_the_hub(models, published, monkeypatch):
    checkpoint(models / "someone" / "tuned" / "local.safetensors")
    gemma(models / "someone" / "tuned" / "gemma")
    monkeypatch.chdir(models)
    assert resolve_model("someone/tuned").name == "local"
    assert published.requests == []


def test_several_files_in_a_repository_are_named(published):
    published.files["someone/tuned"]["second.safetensors"] = b"12345"
    message = refused("someone/tuned")
    assert "choose one, such as someone/tuned:second.safetensors (5 B), someone/tuned:tuned.safetensors" in message


def test_wrong_repositories_and_files(published):
    assert "did you mean tuned.safetensors" in refused("someone/tuned:tunde.safetensors")
    assert "no such file in the repository" in refused("someone/tuned:nothing-alike.safetensors")
    assert "no such repository" in refused("someone/nothing")
    published.files["someone/empty"] = {"README.md": b""}
    assert "holds no .safetensors checkpoint" in refused("someone/empty")
    published.gated.add("someone/tuned")
    assert "hf auth login" in refused("someone/tuned")


def test_an_invalid_repository_name(no_hub):
    assert "not a repository name" in refused("some--one/tuned")
    assert "not a repository name" in refused("some--one/tuned:file.safetensors")


def test_a_downloaded_file_of_another_family_is_recognised(published):
    path = save(published.cache.parent / "flux.safetensors", ("double_blocks.0.img_attn.qkv.weight",))
    published.files["someone/flux"] = {"flux.safetensors": path.read_bytes()}
    list(download(missing("someone/flux", text_encoder=str(gemma(path.parent / "gemma"))).plan))
    assert "Flux" in refused("someone/flux:flux.safetensors")


def test_a_text_encoder_of_ones_own_is_planned_downloaded_and_found(published, tmp_path):
    path = checkpoint(tmp_path / "local" / "model.safetensors")
    folder = gemma(tmp_path / "source")
    published.files["someone/gemma"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    found = missing(path, text_encoder="someone/gemma")
    assert found.plan.nbytes == sum(file.stat().st_size for file in folder.iterdir())
    list(download(found.plan))
    files = resolve_model(str(path), text_encoder="someone/gemma")
    assert files.text_encoder == snapshot(published.cache, "someone/gemma").parent / COMMIT
    assert "holds no Gemma 3 model" in refused(path, text_encoder="someone/tuned")


def test_a_checkpoint_in_a_sub_folder_of_a_repository_finds_its_neighbours(published, tmp_path):
    repo = published.files["someone/tuned"]
    repo["models/deep.safetensors"] = repo["tuned.safetensors"]
    spec = "someone/tuned:models/deep.safetensors"
    list(download(missing(spec, text_encoder=str(gemma(tmp_path / "gemma"))).plan))
    folder = cached_snapshot("someone/tuned")
    gemma(folder / "text")
    assert resolve_model(spec).text_encoder == folder / "text"
