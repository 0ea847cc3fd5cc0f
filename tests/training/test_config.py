"""A training's config: what is read, and each mistake's one line."""

import pytest

from mlx_ltx.errors import UserError
from mlx_ltx.training.config import config_from, read_config
from mlx_ltx.training.flow import NoiseLevels

LEAST = {"model": {"model_path": "demo"}, "data": {"preprocessed_data_root": "latents"}, "output_dir": "out"}


def with_setting(path, value):
    values = {key: dict(each) if isinstance(each, dict) else each for key, each in LEAST.items()}
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return values


def test_the_least(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {model_path: demo}\ndata: {preprocessed_data_root: latents}\noutput_dir: out\n")
    config = read_config(path)
    assert config == config_from(LEAST)
    assert config.is_lora
    assert config.flow_matching.levels == NoiseLevels()
    assert "output_dir" not in config.identity()


def test_numbers_as_yaml_spells_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {model_path: demo, training_mode: full}\ndata: {preprocessed_data_root: latents}\noutput_dir: out\n"
        "optimization: {learning_rate: 5e-4, ema_decay: 0.999, steps: 1e3}\n"
        "acceleration: {mixed_precision_mode: no}\n"
        "flow_matching: {timestep_sampling_mode: uniform, timestep_sampling_params: {max_value: 0.5}}\n"
        "validation: {interval: null, video_dims: [64, 64, 9], samples: [{prompt: a}, {prompt: b, seed: 3}]}\n"
    )
    config = read_config(path)
    assert config.optimization.learning_rate == 5e-4
    assert config.optimization.steps == 1000
    assert config.acceleration.mixed_precision_mode == "no"
    assert config.flow_matching.levels == NoiseLevels("uniform", max_value=0.5)
    assert [sample.seed for sample in config.validation.samples] == [None, 3]
    assert "lora" not in config.identity()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimization.learning_rat", 1, "optimization.learning_rat: no such setting; did you mean learning_rate?"),
        ("hub", {}, "hub: no such setting; it can be model, data, "),
        ("lora", 3, "lora: must hold settings, not 3"),
        ("lora.rank", 0, "lora.rank: must be between 1 and 4096, not 0"),
        ("lora.rank", 1.5, "lora.rank: must be a whole number, not 1.5"),
        ("lora.rank", "many", "lora.rank: must be a number, not many"),
        ("lora.rank", True, "lora.rank: must be a number, not True"),
        ("lora.target_modules", "to_k", "lora.target_modules: must be a list, not to_k"),
        ("lora.target_modules", [1], r"lora.target_modules\[0\]: must be text, not 1"),
        ("model.training_mode", "half", "model.training_mode: must be lora or full, not half"),
        ("model", {}, "model.model_path: is missing"),
        ("training_strategy.with_audio", "yes please", "training_strategy.with_audio: must be true or false"),
        ("training_strategy", {"name": "text_to_audio", "with_audio": True}, "with_audio: is of text_to_video"),
        ("optimization.learning_rate", float("nan"), "optimization.learning_rate: must be a number"),
        ("optimization.warmup_steps", 3000, "optimization.warmup_steps: 3000 must be fewer than"),
        ("optimization.ema_decay", 0.9, "optimization.ema_decay: is for training_mode full"),
        ("optimization.muon_learning_rate", 0.1, "optimization.muon_learning_rate: is for training_mode full"),
        ("optimization.muon_within", "blocks.", "optimization.muon_within: needs an optimization.muon_learning_rate"),
        ("training_strategy.sound_given_p", 1.5, "training_strategy.sound_given_p: must be between 0 and 1"),
        ("training_strategy.picture_given_p", 0.5, "picture_given_p: are of a training with_audio"),
        (
            "training_strategy",
            {"with_audio": True, "sound_given_p": 0.5, "picture_given_p": 0.6},
            "picture_given_p: are more than 1 together, 1.1",
        ),
        ("acceleration.quantization", "q9", "acceleration.quantization: must be q8 or q6 or"),
        ("checkpoints.keep_last_n", 0, "checkpoints.keep_last_n: must be -1"),
        ("flow_matching.timestep_sampling_params", {"sigma": 1}, "timestep_sampling_params: can hold std, eps"),
        ("validation.video_dims", [1, 2], "validation.video_dims: must be a list of 3, not of 2"),
        ("validation.samples", [{"seed": 1}], r"validation.samples\[0\].prompt: is missing"),
        ("data.reference_downscale_factor", 2, "data.reference_downscale_factor: is of video_to_video"),
    ],
)
def test_mistakes(path, value, message):
    with pytest.raises(UserError, match=message):
        config_from(with_setting(path, value))


def test_quantised_weights_are_not_trained_in_full():
    values = with_setting("model.training_mode", "full") | {"acceleration": {"quantization": "q8"}}
    with pytest.raises(UserError, match=r"acceleration.quantization: is for training_mode lora"):
        config_from(values)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"config.yaml: cannot be read"):
        read_config(path)
    path.write_text("model: {model_path: demo\n")
    with pytest.raises(UserError, match=r"config.yaml: is not YAML in line 2"):
        read_config(path)
    path.write_text("just text")
    with pytest.raises(UserError, match=r"config.yaml: the config: must hold settings, not just text"):
        read_config(path)
    path.write_text("")
    with pytest.raises(UserError, match=r"config.yaml: model: is missing"):
        read_config(path)
