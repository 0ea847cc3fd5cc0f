"""Prompt enhancement: the text that comes out, the events on the way, and a clip made from it."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mlx_ltx.pipelines.enhance as enhancing
from clips import frames_of
from mlx_ltx.checkpoints.chat import load_chat
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.checkpoints.gemma_vision import NoVision
from mlx_ltx.errors import UserError
from mlx_ltx.events import Finished, PhaseStarted, Planned, Progress, PromptEnhanced, TextStreamed, Warned
from mlx_ltx.media.video import read_metadata
from mlx_ltx.pipelines.enhance import ENHANCE, LIMIT, Cleaner, SeenImage, enhance, enhance_only, look
from mlx_ltx.pipelines.instructions import IMAGE_INSTRUCTIONS, TEXT_INSTRUCTIONS
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.request import ImageInput, Request

PROMPT = "a red ball rolls over grass"
CLIP = {"model": "demo", "pipeline": "distilled", "width": 128, "height": 64, "num_frames": 9, "dtype": "float32"}


@pytest.fixture(scope="module")
def talking(instruct_gemma):
    text_model = load_gemma(instruct_gemma, mx.float32)
    return text_model, load_chat(instruct_gemma, text_model.tokenizer)


@pytest.fixture
def short(monkeypatch) -> int:
    """So few tokens that random weights, which seldom stop by themselves, are done soon."""
    monkeypatch.setattr(enhancing, "LIMIT", 12)
    return 12


def finish(steps, seen: list | None = None):
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if seen is not None:
            seen.append(step)


def a_request(folder: Path, output: Path, **changes: object) -> Request:
    return Request(**{"prompt": PROMPT, "output": output, "text_encoder": str(folder), **CLIP, **changes})


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A cat walks.", "A cat walks."),
        ('"A cat" — she said, ‘hello’.\n', "A cat\" - she said, 'hello'."),
        ("**1. A\N{NO-BREAK SPACE}cat", "A cat"),
        ("  \n Été – neige", "Été - neige"),
        ("猫 walks 3′ to 5−2", "猫 walks 3' to 5-2"),
        ("... 12 !", ""),
        ("", ""),
    ],
)
def test_text_is_cleaned(raw: str, clean: str) -> None:
    assert Cleaner()(raw) == clean


@given(st.lists(st.text("ab “—1 \n*é", max_size=4)))
def test_pieces_are_cleaned_as_the_whole_is(pieces: list[str]) -> None:
    cleaner = Cleaner()
    joined = "".join(cleaner(piece) for piece in pieces)
    assert joined == Cleaner()("".join(pieces))
    assert not re.match(r"[^a-zé]", joined)
    assert joined == joined.strip()


def test_pieces_joined_are_the_result_and_belong_to_the_seed(talking) -> None:
    seen: list[float | str] = []
    first = finish(enhance(*talking, PROMPT, seed=1, limit=40), seen)
    assert "".join(step for step in seen if isinstance(step, str)) == first
    assert len(first) > 10
    counts = [step for step in seen if isinstance(step, float)]
    assert counts == sorted(counts)
    assert counts[-1] == 40
    assert 0 < counts[0] < 1  # reading, layer by layer
    assert finish(enhance(*talking, PROMPT, seed=1, limit=40)) == first
    assert finish(enhance(*talking, PROMPT, seed=2, limit=40)) != first
    assert finish(enhance(*talking, PROMPT + "!", seed=1, limit=40)) != first


def test_characters_of_several_tokens_stream_whole(talking, monkeypatch) -> None:
    text_model, chat = talking
    ids = text_model.tokenizer.verbatim("Ein Kätzchen — 猫 und “mehr” 🙂 Ende")
    monkeypatch.setattr(enhancing, "write_tokens", lambda *args, **settings: iter(ids))
    seen: list[float | str] = []
    result = finish(enhance(text_model, chat, PROMPT, seed=1), seen)
    assert result == 'Ein Kätzchen - 猫 und "mehr" 🙂 Ende'
    assert all("\N{REPLACEMENT CHARACTER}" not in step for step in seen if isinstance(step, str))
    assert sum(isinstance(step, str) for step in seen) > 5


def test_the_model_is_told_what_to_do_and_stops_at_the_end_of_its_turn(talking, monkeypatch) -> None:
    text_model, chat = talking
    told = {}

    def write(model, ids, *, stop, limit, seed, image):
        told.update(ids=ids, stop=stop, limit=limit, seed=seed, image=image)
        return iter(text_model.tokenizer.verbatim("A ball rolls."))

    monkeypatch.setattr(enhancing, "write_tokens", write)
    assert finish(enhance(text_model, chat, PROMPT, seed=7)) == "A ball rolls."
    text = chat.tokenizer.tokenizer.decode(told["ids"], skip_special_tokens=False)
    assert text == (
        f"<bos><start_of_turn>user\n{TEXT_INSTRUCTIONS}\n\nuser prompt: {PROMPT}<end_of_turn>\n<start_of_turn>model\n"
    )
    assert (told["stop"], told["limit"], told["seed"], told["image"]) == (chat.stop, LIMIT, 7, None)

    features = mx.zeros((1, 3, text_model.model.config.hidden_size))
    finish(enhance(text_model, chat, PROMPT, seed=7, image=SeenImage(features, 9)))
    assert told["ids"][told["image"].first :][:4] != told["ids"][told["image"].first + 1 :][:4]
    assert told["ids"][told["image"].first :][:3] == [9, 9, 9]
    assert IMAGE_INSTRUCTIONS in chat.tokenizer.tokenizer.decode(told["ids"], skip_special_tokens=False)


def test_an_image_changes_the_text(talking) -> None:
    size = talking[0].model.config.hidden_size
    images = [SeenImage(mx.random.normal((1, 4, size), key=mx.random.key(seed)), 9) for seed in (1, 2)]
    texts = {finish(enhance(*talking, PROMPT, seed=1, image=image, limit=30)) for image in (None, *images)}
    assert len(texts) == 3


def test_enhance_only_streams_and_writes_nothing(instruct_gemma, tmp_path, short) -> None:
    job = prepare(a_request(instruct_gemma, tmp_path / "a.mp4"))
    events: list = []
    (prompt,) = finish(enhance_only(job), events)
    assert [phase.name for phase in events[0].phases] == [ENHANCE]
    streamed = "".join(event.text for event in events if isinstance(event, TextStreamed))
    assert [event for event in events if isinstance(event, PromptEnhanced)] == [PromptEnhanced(streamed, PROMPT)]
    assert prompt == streamed != PROMPT
    progress = [event for event in events if isinstance(event, Progress)]
    assert {event.total for event in progress} == {short}
    assert progress[-1].done <= short
    assert list(tmp_path.iterdir()) == []
    assert json.dumps([event.to_json() for event in events])


def test_a_clip_is_made_from_the_enhanced_prompt_and_replays_without_enhancing(
    instruct_gemma, tmp_path, short, monkeypatch
) -> None:
    """The text model is loaded once for both, and gone when they are done."""
    loads: list[weakref.ref] = []
    alive_at_embedding = []
    real = enhancing.load_gemma

    def load(*args: object):
        loaded = real(*args)
        loads.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(enhancing, "load_gemma", load)
    events = []
    for event in prepare(a_request(instruct_gemma, tmp_path / "a.mp4", enhance_prompt=True)).run():
        if isinstance(event, PhaseStarted) and event.phase.name == "embed-text":
            gc.collect()
            alive_at_embedding = [model() is not None for model in loads]
        events.append(event)
    assert alive_at_embedding == [False]
    assert isinstance(events[0], Planned)
    assert [phase.name for phase in events[0].phases][:2] == [ENHANCE, "read-text"]
    (enhanced,) = [event for event in events if isinstance(event, PromptEnhanced)]
    assert isinstance(events[-1], Finished)
    assert events[-1].clips[0].prompt == enhanced.prompt
    settings = read_metadata(tmp_path / "a.mp4")
    assert (settings["prompt"], settings["original_prompt"]) == (enhanced.prompt, PROMPT)
    assert "enhance_prompt" not in settings

    again = Request.from_settings(settings).with_changes(output=tmp_path / "b.mp4")
    assert not any(isinstance(event, PromptEnhanced) for event in prepare(again).run())
    assert read_metadata(tmp_path / "b.mp4")["original_prompt"] == PROMPT
    plain = a_request(instruct_gemma, tmp_path / "c.mp4")
    assert isinstance([*prepare(plain).run()][-1], Finished)
    clips = [frames_of(tmp_path / f"{name}.mp4") for name in "abc"]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])  # another prompt, another clip


def test_several_prompts_and_seeds_are_enhanced_once_each(instruct_gemma, tmp_path, short) -> None:
    request = a_request(
        instruct_gemma, tmp_path / "a.mp4", prompt="", prompts=("a cat", "a dog"), seeds=(3, 4), enhance_prompt=True
    )
    events: list = []
    prompts = finish(enhance_only(prepare(request)), events)
    enhanced = [event for event in events if isinstance(event, PromptEnhanced)]
    assert [event.original for event in enhanced] == ["a cat", "a dog"]
    assert prompts == [event.prompt for event in enhanced]
    alone = a_request(instruct_gemma, tmp_path / "a.mp4", prompt="a dog", seed=3)
    assert finish(enhance_only(prepare(alone))) == prompts[1:]
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == sorted(done)
    assert max(done) <= 2 * short


def test_without_the_vision_extra_the_text_alone_is_enhanced_with_a_warning(instruct_gemma, tmp_path, short) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "i.png")
    request = a_request(instruct_gemma, tmp_path / "a.mp4", images=(ImageInput(tmp_path / "i.png"),))
    events: list = []
    with_image = finish(enhance_only(prepare(request)), events)
    (warning, *_) = [event.message for event in events if isinstance(event, Warned)]
    assert warning.startswith("the prompt is enhanced without its image: ")
    assert with_image == finish(enhance_only(prepare(a_request(instruct_gemma, tmp_path / "a.mp4"))))


def test_linear_pictures_are_not_shown(instruct_gemma) -> None:
    with pytest.raises(NoVision, match="EXR"):
        look(instruct_gemma, Path("frame.exr"), mx.float32)


def test_the_first_image_is_shown(instruct_gemma, tmp_path, short, monkeypatch) -> None:
    size = load_gemma(instruct_gemma, mx.float32).model.config.hidden_size
    looked = []

    def see(folder, image, dtype):
        looked.append((folder, image, dtype))
        return SeenImage(mx.random.normal((1, 4, size), key=mx.random.key(0)), 9)

    monkeypatch.setattr(enhancing, "look", see)
    for name in ("i.png", "j.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / name)
    images = (ImageInput(tmp_path / "i.png"), ImageInput(tmp_path / "j.png", 8))
    events: list = []
    request = a_request(instruct_gemma, tmp_path / "a.mp4", images=images)
    shown = finish(enhance_only(prepare(request)), events)
    assert looked == [(instruct_gemma, tmp_path / "i.png", mx.float32)]
    assert not any("image" in event.message for event in events if isinstance(event, Warned))
    assert shown != finish(enhance_only(prepare(a_request(instruct_gemma, tmp_path / "a.mp4"))))


def test_a_text_that_does_not_end_is_said_to_be_cut_off(instruct_gemma, tmp_path, short, monkeypatch) -> None:
    job = prepare(a_request(instruct_gemma, tmp_path / "a.mp4"))

    def write(count):
        return lambda model, ids, **settings: iter([300] * count)

    for count, warned in ((short, True), (short - 1, False)):
        events: list = []
        monkeypatch.setattr(enhancing, "write_tokens", write(count))
        finish(enhance_only(job), events)
        assert any("cut off" in event.message for event in events if isinstance(event, Warned)) is warned


def test_an_empty_answer_is_an_error(instruct_gemma, tmp_path, short, monkeypatch) -> None:
    monkeypatch.setattr(enhancing, "write_tokens", lambda *args, **settings: iter(()))
    with pytest.raises(UserError, match="wrote no enhanced prompt; try another --seed"):
        finish(enhance_only(prepare(a_request(instruct_gemma, tmp_path / "a.mp4"))))


def test_a_base_model_cannot_enhance(instruct_gemma, tmp_path) -> None:
    base = Path(shutil.copytree(instruct_gemma, tmp_path / "tiny-pt"))
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="not an instruction-tuned Gemma 3"):
        finish(enhance_only(prepare(a_request(base, tmp_path / "a.mp4"))))
