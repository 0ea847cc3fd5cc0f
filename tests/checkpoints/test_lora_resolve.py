"""From ``--lora`` and ``--camera`` to a file: the catalogue of LoRAs, local files, and the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.file_download import repo_folder_name

from mlx_ltx.checkpoints.__main__ import main
from mlx_ltx.checkpoints.catalogue import LTX_2_LICENCE, MODELS, RemoteFile, model_names
from mlx_ltx.checkpoints.hub import download, plan_parts
from mlx_ltx.checkpoints.lora_catalogue import (
    CAMERA_MOVES,
    LORAS,
    camera_lora,
    distilled_lora,
    find_lora,
    find_lora_file,
    generation_of,
)
from mlx_ltx.checkpoints.lora_resolve import loras_on_disk, resolve_lora
from mlx_ltx.checkpoints.offer import commands
from mlx_ltx.checkpoints.resolve import MissingFiles
from mlx_ltx.errors import UserError

LTX_2, LTX_2_3 = (2, 0), (2, 3, 0)


def cache(folder: Path, repo: str, *names: str) -> Path:
    """Put files of a repository into the hub's cache; gives its snapshot."""
    root = folder / repo_folder_name(repo_id=repo, repo_type="model")
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    for name in names:
        (snapshot / name).write_bytes(b"")
    return snapshot


def refused(source: object, version: tuple[int, ...] | None = None, layers: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        resolve_lora(str(source), version, layers)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, MissingFiles)
    return str(caught.value)


def missing(source: str, version: tuple[int, ...] | None = None, layers: int | None = None) -> MissingFiles:
    with pytest.raises(MissingFiles) as caught:
        resolve_lora(source, version, layers)
    assert "\n" not in str(caught.value)
    return caught.value


# The catalogue


def test_names_are_unique_and_none_is_a_models():
    assert {name: entry.name for name, entry in LORAS.items()} == {name: name for name in LORAS}
    assert not LORAS.keys() & set(model_names())
    assert len({entry.file.name for entry in LORAS.values()}) == len(LORAS)
    for name, entry in LORAS.items():
        assert name == name.lower()
        assert find_lora(f" {name.upper()}") is entry is find_lora_file(entry.file.name)
        assert entry.file.name.endswith(".safetensors")
        assert set(entry.generations) <= {model.generation for model in MODELS.values()}
    assert find_lora("nothing") is find_lora_file("nothing.safetensors") is None


def test_a_lora_is_for_the_generation_in_its_file_name_at_least():
    for entry in LORAS.values():
        assert ("2.3" if entry.file.name.startswith("ltx-2.3-22b-") else "2") in entry.generations


def test_every_camera_move_has_a_lora():
    assert set(CAMERA_MOVES) == {
        "dolly-in", "dolly-out", "dolly-left", "dolly-right", "jib-up", "jib-down", "static"
    }  # fmt: skip
    entry = camera_lora("Jib-Up")
    assert entry.file.repo == "Lightricks/LTX-2-19b-LoRA-Camera-Control-Jib-Up"
    assert entry.file.name == "ltx-2-19b-lora-camera-control-jib-up.safetensors"
    with pytest.raises(UserError, match="--camera pan: must be one of dolly-in, "):
        camera_lora("pan")


def test_each_generation_has_its_distilled_lora():
    assert distilled_lora("2.3").file.name == "ltx-2.3-22b-distilled-lora-384-1.1.safetensors"
    assert distilled_lora("2").file.name == "ltx-2-19b-distilled-lora-384.safetensors"
    assert distilled_lora("demo") is None


@pytest.mark.parametrize(
    ("version", "generation"), [((2, 0), "2"), ((2,), "2"), ((2, 0, 1), "2"), ((2, 3, 0), "2.3"), ((2, 5), "2.5")]
)
def test_generations(version, generation):
    assert generation_of(version) == generation


# Resolving


def test_a_name_of_the_catalogue(no_hub):
    entry = LORAS["camera-dolly-in"]
    found = missing("camera-dolly-in", LTX_2_3)
    assert found.plan.parts == (entry.file,)
    assert found.plan.licences == (LTX_2_LICENCE,)
    assert "327 MB to download" in str(found)
    assert commands(found.plan) == "get it with `python -m mlx_ltx.checkpoints download camera-dolly-in`"
    assert loras_on_disk() == []
    snapshot = cache(no_hub, entry.file.repo, entry.file.name)
    assert resolve_lora("Camera-Dolly-In", LTX_2) == snapshot / entry.file.name
    assert resolve_lora(f"{entry.file.repo}:{entry.file.name}") == snapshot / entry.file.name
    assert resolve_lora(entry.file.repo) == snapshot / entry.file.name
    assert loras_on_disk() == [entry]


@pytest.mark.parametrize(
    ("source", "version"),
    [
        ("ltx-2-distilled-lora", LTX_2_3),
        ("ltx-2.3-distilled-lora", LTX_2),
        ("ltx-2.3-union-control", LTX_2),
        ("Lightricks/LTX-2:ltx-2-19b-distilled-lora-384.safetensors", LTX_2_3),
        ("Lightricks/LTX-2.3", LTX_2),
        ("someone/mirror:loras/ltx-2-19b-distilled-lora-384.safetensors", LTX_2_3),
    ],
)
def test_another_generations_lora_is_refused_before_it_is_downloaded(no_hub, source, version):
    other = generation_of(LTX_2 if version == LTX_2_3 else LTX_2_3)
    assert f"is for LTX-{other}, but the model is LTX-{generation_of(version)}" in refused(source, version)


@pytest.mark.parametrize("source", ["camera-dolly-in", LORAS["camera-dolly-in"].file.repo])
def test_a_published_lora_that_cannot_fit_is_refused_before_it_is_downloaded(no_hub, source):
    told = refused(source, LTX_2_3, 4)
    assert f"--lora {source}: is for 48 transformer blocks, but this model has 4" in told
    missing(source, LTX_2_3, 48)


def test_a_published_file_is_known_by_its_name_wherever_it_lies(no_hub, tmp_path):
    path = tmp_path / "ltx-2-19b-distilled-lora-384.safetensors"
    path.write_bytes(b"")
    assert resolve_lora(str(path), LTX_2) == resolve_lora(str(path)) == path
    assert "is for LTX-2, but the model is LTX-2.3" in refused(path, LTX_2_3)


def test_local_files_and_folders(no_hub, tmp_path):
    assert "there is nothing at that path" in refused(tmp_path / "lora.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"")
    assert "only .safetensors" in refused(tmp_path / "lora.bin")
    assert "holds no .safetensors file" in refused(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(b"")
    assert resolve_lora(str(tmp_path)) == tmp_path / "one.safetensors"
    (tmp_path / "two.safetensors").write_bytes(b"")
    assert "several files (one.safetensors, two.safetensors)" in refused(tmp_path)


def test_a_misspelt_name(no_hub):
    assert "did you mean camera-dolly-in" in refused("camera-doly-in")
    assert "checkpoints list" in refused("xyzzy")


def test_a_file_on_the_hub_is_planned_downloaded_and_found(hub):
    hub.files["someone/style"] = {"style.safetensors": b"0123456789", "README.md": b"x"}
    for source in ("someone/style", "someone/style:style.safetensors"):
        found = missing(source)
        assert found.plan.parts == (RemoteFile("someone/style", "style.safetensors", 10),)
        assert commands(found.plan) == "get it with `hf download someone/style style.safetensors`"
    list(download(found.plan))
    hub.requests.clear()
    assert resolve_lora("someone/style:style.safetensors").read_bytes() == b"0123456789"
    assert resolve_lora("someone/style").read_bytes() == b"0123456789"
    assert hub.requests == []


def test_pefts_settings_come_along(hub):
    hub.files["someone/peft"] = {"adapter_model.safetensors": b"01234", "adapter_config.json": b"{}"}
    found = missing("someone/peft")
    assert [part.name for part in found.plan.parts] == ["adapter_model.safetensors", "adapter_config.json"]
    list(download(found.plan))
    assert resolve_lora("someone/peft").with_name("adapter_config.json").read_bytes() == b"{}"


def test_what_is_not_on_the_hub(hub):
    hub.files["someone/two"] = {"first.safetensors": b"1", "second.safetensors": b"22"}
    message = refused("someone/two")
    assert "choose one, such as someone/two:first.safetensors (1 B), someone/two:second.safetensors (2 B)" in message
    assert "did you mean first.safetensors" in refused("someone/two:frist.safetensors")
    hub.files["someone/none"] = {"README.md": b""}
    assert "no .safetensors file" in refused("someone/none")
    assert "no such repository" in refused("someone/nothing")
    assert "not a repository name" in refused("some--one/x")


# The command


def test_the_list_names_every_lora(no_hub, capsys):
    cache(no_hub, LORAS["camera-static"].file.repo, LORAS["camera-static"].file.name)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in LORAS:
        assert any(line.startswith(name) for line in lines)
    assert [line.split()[0] for line in lines if line.endswith("(on this machine)")] == ["camera-static"]


def test_downloading_a_lora_by_name(no_hub, capsys):
    assert main(["download", "camera-static", "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert shown == plan_parts("camera-static", [LORAS["camera-static"].file]).summary() + "\n"
    assert main(["download", "camera-static", "--text-encoder", "gemma-3-12b-4bit", "--dry-run"]) == 1
    assert "is a LoRA" in capsys.readouterr().err
    assert main(["download", "camera-statik", "--dry-run"]) == 1
    assert "did you mean camera-static" in capsys.readouterr().err
