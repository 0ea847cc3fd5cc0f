"""Whole trainings of the demo: what comes out, killing and resuming, and what goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from PIL import Image

from mlx_ltx import train as command
from mlx_ltx.checkpoints import writing
from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.lora import LoraFile
from mlx_ltx.checkpoints.packs import write_pack
from mlx_ltx.checkpoints.quantize import Quantization
from mlx_ltx.errors import UserError
from mlx_ltx.events import FileWritten, TrainingFinished, TrainingStep, Warned
from mlx_ltx.training import trainer
from mlx_ltx.training.config import config_from
from mlx_ltx.training.precompute import precompute
from mlx_ltx.training.trainer import Trainer, train


def run(settings, **options):
    return list(train(config_from(settings), **options))


def losses(events):
    return [event.loss for event in events if isinstance(event, TrainingStep)]


def names(settings, folder="checkpoints"):
    return sorted(path.name for path in Path(settings["output_dir"], folder).iterdir())


def test_a_lora(ready):
    ready["checkpoints"] = {"interval": 1, "keep_last_n": 2, "precision": "float32"}
    events = run(ready)
    assert len(losses(events)) == 4
    assert names(ready) == [
        "lora_weights_step_00003.safetensors",
        "lora_weights_step_00004.safetensors",
        "training_state_step_00003.safetensors",
        "training_state_step_00004.safetensors",
    ]
    finished = events[-1]
    assert isinstance(finished, TrainingFinished)
    assert finished.weights_path.name == "lora_weights_step_00004.safetensors"
    file = LoraFile(finished.weights_path)
    assert file.file.metadata["lora_rank"] == "4"
    assert file.file.metadata["trained_steps"] == "4"
    assert any(".audio_to_video_attn." in layer.name for layer in file.layers.values())
    plot = Image.open(Path(ready["output_dir"], "loss.png"))
    assert plot.size == (960, 480)
    assert json.loads(Path(ready["output_dir"], "training_config.json").read_text())["lora"]["rank"] == 4


def test_a_whole_model(ready):
    ready["model"]["training_mode"] = "full"
    ready["optimization"] |= {"steps": 3, "ema_decay": 0.9}
    ready["checkpoints"] = {"interval": None, "precision": "float32"}
    whole = Trainer(config_from(ready))
    *_, finished = whole.run(resume=False)
    base = SafetensorsFile(next(demo_folder().glob("*demo*.safetensors")))
    made = SafetensorsFile(finished.weights_path)
    assert made.tensors.keys() == base.tensors.keys()
    assert made.config == base.config
    model = load_transformer(made, mx.float32)
    average = whole.training.result
    weight = model.blocks[0].video.attn1.to_q.weight
    assert mx.array_equal(weight, average["blocks.0.video.attn1.to_q.weight"])
    assert not mx.array_equal(weight, whole.training.parameters["blocks.0.video.attn1.to_q.weight"])
    key = next(key for key in base.tensors if key.startswith("vae."))
    assert mx.array_equal(made.arrays[key], base.arrays[key])


@pytest.mark.parametrize("strategy", [{"name": "text_to_video"}, {"name": "text_to_audio"}])
def test_one_stream(ready, strategy):
    ready["training_strategy"] = strategy
    ready["optimization"]["steps"] = 1
    events = run(ready)
    stream = "audio" if strategy["name"] == "text_to_audio" else "video"
    (step,) = (event for event in events if isinstance(event, TrainingStep))
    assert list(step.losses) == [stream]
    layers = [layer.name for layer in LoraFile(events[-1].weights_path).layers.values()]
    assert layers
    assert all((".audio_attn" in name) == (stream == "audio") for name in layers)


def test_bf16_with_quantised_base_and_checkpointing(ready):
    ready["acceleration"] = {"mixed_precision_mode": "bf16", "quantization": "q8"}
    ready["optimization"] |= {"enable_gradient_checkpointing": True, "steps": 2}
    events = run(ready)
    assert np.isfinite(losses(events)).all()
    file = SafetensorsFile(events[-1].weights_path)
    assert {info.dtype for info in file.tensors.values()} == {"BF16"}


def test_validation_clips(ready):
    ready["optimization"]["steps"] = 3
    ready["checkpoints"]["interval"] = 3
    ready["validation"] = {"interval": 2, "video_dims": [128, 64, 9], "samples": [{"prompt": "a red wave"}]}
    events = run(ready)
    written = [event for event in events if isinstance(event, FileWritten) and event.kind == "validation clip"]
    assert [path.path.relative_to(ready["output_dir"]) for path in written] == [Path("validation/step_00002/01.mp4")]
    assert names(ready, "validation/step_00002") == ["01.mp4"]
    # Making room for them changes nothing of the training.
    del ready["validation"]
    ready["output_dir"] += "-without"
    assert losses(run(ready)) == losses(events)


def test_validation_sounds(ready):
    ready["training_strategy"] = {"name": "text_to_audio"}
    ready["data"]["audio_duration"] = 0.5
    ready["optimization"]["steps"] = 1
    ready["validation"] = {"interval": 1, "samples": [{"prompt": "a tone"}]}
    events = run(ready)
    assert not [event.message for event in events if isinstance(event, Warned)]
    assert names(ready, "validation/step_00001") == ["01.wav"]


def test_a_validation_clip_that_fails_does_not_stop_the_training(ready, monkeypatch):
    ready["validation"] = {"interval": 2, "video_dims": [128, 64, 9], "samples": [{"prompt": "a red wave"}]}

    def fail(*arguments):
        raise UserError("no memory for it")
        yield

    monkeypatch.setattr(trainer, "make_samples", fail)
    events = run(ready)
    assert [event.message for event in events if isinstance(event, Warned)] == ["validation: no memory for it"] * 2
    assert len(losses(events)) == 4


def test_validation_that_cannot_work_is_told_before(ready):
    ready["validation"] = {"interval": 2, "video_dims": [100, 64, 9], "samples": [{"prompt": "a"}]}
    with pytest.raises(UserError, match=r"validation.samples\[0\]: --width 100"):
        run(ready)
    ready["validation"] = {"interval": 2, "samples": [{"prompt": "a", "reference": "x.mp4"}]}
    with pytest.raises(UserError, match=r"validation.samples\[0\]: has a reference, which is of video_to_video"):
        run(ready)


def test_an_ic_lora(settings, media, tmp_path):
    """Its file says how much smaller references are, and the pipeline makes a clip with it."""
    folder = tmp_path / "pairs"
    shutil.copytree(media, folder)
    shutil.copytree(media, folder / "references")
    settings["training_strategy"] = {"name": "video_to_video"}
    settings["data"] |= {
        "dataset": str(folder), "resolution_buckets": ["128x64x9"], "reference_downscale_factor": 2,
    }  # fmt: skip
    sample = {"prompt": "a red wave", "reference": str(media / "clip0.mp4")}
    settings["validation"] = {"interval": 1, "video_dims": [128, 64, 9], "samples": [sample]}
    settings["optimization"]["steps"] = 1
    list(precompute(config_from(settings)))
    events = run(settings)
    assert not [event.message for event in events if isinstance(event, Warned)]
    assert Path(settings["output_dir"], "validation", "step_00001", "01.mp4").is_file()
    file = LoraFile(events[-1].weights_path)
    assert file.info.reference_downscale_factor == 2
    assert not any("audio" in layer.name for layer in file.layers.values())


@pytest.fixture
def config_file(ready, tmp_path):
    path = tmp_path / "config.yaml"

    def write():
        path.write_text(yaml.safe_dump(ready))
        return str(path)

    return write


def test_killed_and_resumed(ready, config_file):
    """Killed without warning between two saves, the training goes on as if nothing had been."""
    ready["model"]["model_path"] = str(demo_folder())  # in another process, "demo" is the embedded one
    ready["lora"]["dropout"] = 0.1
    ready["optimization"] |= {"steps": 8, "gradient_accumulation_steps": 2, "warmup_steps": 3}
    ready["checkpoints"] |= {"interval": 3, "precision": "float32"}
    whole_output, ready["output_dir"] = ready["output_dir"], ready["output_dir"] + "-killed"
    arguments = [sys.executable, "-m", "mlx_ltx.train", config_file(), "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "TrainingStep" and event["step"] == 5:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert names(ready) == ["lora_weights_step_00003.safetensors", "training_state_step_00003.safetensors"]
    Path(
        ready["output_dir"], "checkpoints", ".training_state.0.partial.safetensors"
    ).touch()  # as if it had been saving
    resumed = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in resumed.stdout.splitlines()]
    steps = [event for event in events if event["event"] == "TrainingStep"]
    assert [step["step"] for step in steps] == [4, 5, 6, 7, 8]
    assert not [name for name in names(ready) if name.startswith(".")]
    ready["output_dir"] = whole_output
    expected = run(ready)
    assert [sum(step["losses"].values()) for step in steps] == pytest.approx(losses(expected)[3:], rel=1e-6)
    one = mx.load(str(expected[-1].weights_path))
    other = mx.load(events[-1]["weights_path"])
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert mx.allclose(other[key], value, rtol=1e-5, atol=1e-7), key


def test_resuming_what_is_not_the_same(ready, latents):
    ready["optimization"]["scheduler_type"] = "constant"
    with pytest.raises(UserError, match=r"--resume: .*out/checkpoints holds no stored training to go on with"):
        run(ready, resume=True)
    run(ready)
    with pytest.raises(UserError, match="out holds a training of 4 steps; go on with --resume, or give another folder"):
        run(ready)
    with pytest.raises(UserError, match="--resume: the training has had its 4 steps"):
        run(ready, resume=True)
    ready["optimization"] |= {"steps": 5, "enable_gradient_checkpointing": True}
    ready["checkpoints"]["interval"] = 1
    for path, value, message in (
        ("lora.alpha", 8, "lora.alpha was 4.0 and is 8.0"),
        ("optimization.learning_rate", 0.5, "optimization.learning_rate was 0.01 and is 0.5"),
        ("training_strategy.with_audio", False, "data set.digest was"),
    ):
        section, name = path.split(".")
        before = ready[section][name]
        ready[section][name] = value
        with pytest.raises(UserError, match=f"belongs to a training with another config: {message}"):
            run(ready, resume=True)
        ready[section][name] = before
    assert len(losses(run(ready, resume=True))) == 1  # at a constant rate, a training can be made longer


def test_a_loss_that_is_no_number(ready, latents, tmp_path):
    """The training stops, and what was stored before stays."""
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    ready["data"]["preprocessed_data_root"] = str(copy)
    ready["optimization"] |= {"batch_size": 1, "steps": 20}
    ready["checkpoints"]["interval"] = 1
    events = train(config_from(ready))
    while not isinstance(next(events), TrainingStep):
        pass
    stored = next(events), next(events)  # one step, then what is written
    assert isinstance(stored[0], FileWritten)
    for path in (copy / "latents").iterdir():
        file = SafetensorsFile(path)
        tensors = {name: mx.full(info.shape, mx.nan) for name, info in file.tensors.items()}
        writing.write_safetensors(path, tensors, file.metadata, force=True)
    with pytest.raises(UserError, match=r"step 3: the loss is not a finite number; .*; step 2 is stored in .*00002"):
        for _ in events:
            pass
    assert SafetensorsFile(Path(ready["output_dir"], "checkpoints", "training_state_step_00002.safetensors"))


def test_a_full_disk_keeps_what_was_stored(ready, config_file, capsys):
    """A limit on the size of files stands for the disk: weights fit under it, the state for resuming does not."""
    ready["model"]["model_path"] = str(demo_folder())
    run(ready | {"optimization": {**ready["optimization"], "steps": 2, "scheduler_type": "constant"}})
    before = {path: path.read_bytes() for path in Path(ready["output_dir"], "checkpoints").iterdir()}
    ready["optimization"]["scheduler_type"] = "constant"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from mlx_ltx.train import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, config_file(), "--resume", "--quiet"], capture_output=True, text=True
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "training_state_step_00004.safetensors: cannot be written, the file grew larger" in line
    for path, content in before.items():
        assert path.read_bytes() == content
    assert not [name for name in names(ready) if "partial" in name or "state_step_00004" in name]
    ready["optimization"]["steps"] = 4
    assert len(losses(run(ready, resume=True))) == 2


def test_latents_of_another_model(ready, latents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    ready["data"]["preprocessed_data_root"] = str(copy)
    for path in (copy / "texts").iterdir():
        writing.write_safetensors(path, {"video": mx.zeros((4, 7)), "audio": mx.zeros((4, 7))}, force=True)
    with pytest.raises(UserError, match="whose video latents or texts have another width than those of demo"):
        run(ready)


def test_quantised_weights_are_not_trained_whole(ready, tmp_path):
    base = SafetensorsFile(next(demo_folder().glob("*demo*.safetensors")))
    list(write_pack(base, tmp_path / "pack", Quantization.parse("q8")))
    ready["model"] |= {
        "model_path": str(tmp_path / "pack"),
        "training_mode": "full",
        "text_encoder_path": str(demo_folder() / "gemma"),
    }
    with pytest.raises(UserError, match="is quantised, and quantised weights cannot be trained"):
        run(ready)


def test_the_command(ready, config_file, capsys):
    assert command.main(["--dry-run", "--json", config_file()]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["samples"] == 3
    assert described["trained_layers"] > 10
    assert not Path(ready["output_dir"]).exists()
    assert command.main([config_file(), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert command.main([config_file(), "--json"]) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["event"] == "Failed"
    assert out.err.startswith("mlx_ltx.train: output_dir: ")
    assert command.main(["precompute", config_file()]) == 1
    assert "data.dataset: is missing" in capsys.readouterr().err
