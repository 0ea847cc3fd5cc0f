"""``--enhance-prompt`` and ``--enhance-only`` on the command line."""

import json
import shutil
from pathlib import Path

import pytest

import mlx_ltx.pipelines.enhance as enhancing
from mlx_ltx.generate import main
from mlx_ltx.media.video import read_metadata

PROMPT = "a red ball rolls over grass"
CLIP = ["--model", "demo", "--pipeline", "distilled", "--width", "128", "--height", "64", "--num-frames", "9"]


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(enhancing, "LIMIT", 12)


def command(folder: Path, *flags: object) -> int:
    return main([*CLIP, "--text-encoder", str(folder), *map(str, flags)])


def test_enhance_only_prints_the_prompt_alone_and_writes_nothing(instruct_gemma, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(instruct_gemma, "--prompt", PROMPT, "--enhance-only", "--quiet") == 0
    prompt = capsys.readouterr().out
    assert prompt.endswith("\n")
    assert prompt.strip() not in ("", PROMPT)
    (tmp_path / "clip.mp4").write_bytes(b"mine")  # a file of the name that stands in for --output
    assert command(instruct_gemma, "--prompt", PROMPT, "--enhance-only") == 0
    shown = capsys.readouterr()
    assert shown.out == prompt
    assert "Enhancing the prompt" in shown.err
    assert (tmp_path / "clip.mp4").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert command(instruct_gemma, "--prompt", PROMPT, "--enhance-only", "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (enhanced,) = [event for event in events if event["event"] == "PromptEnhanced"]
    assert (enhanced["prompt"], enhanced["original"]) == (prompt.strip(), PROMPT)


def test_a_clip_is_made_shown_and_replayed(instruct_gemma, tmp_path, capsys) -> None:
    first, again, other, fresh = (tmp_path / f"{name}.mp4" for name in "abcd")
    assert command(instruct_gemma, "--prompt", PROMPT, "--enhance-prompt", "--output", first) == 0
    settings = read_metadata(first)
    assert settings["original_prompt"] == PROMPT
    assert settings["prompt"] in capsys.readouterr().err.splitlines()  # streamed, in a line of its own

    assert main(["--replay", str(first), "--output", str(again)]) == 0
    assert "Enhancing" not in capsys.readouterr().err
    assert read_metadata(again) == settings

    assert main(["--replay", str(first), "--prompt", "a blue ball", "--output", str(other), "--quiet"]) == 0
    assert read_metadata(other)["prompt"] == "a blue ball"
    assert "original_prompt" not in read_metadata(other)

    # enhanced anew with another seed: from what the user wrote, not from what was made of it
    assert main(["--replay", str(first), "--enhance-prompt", "--seed", "5", "--output", str(fresh), "--quiet"]) == 0
    assert read_metadata(fresh)["original_prompt"] == PROMPT
    assert read_metadata(fresh)["prompt"] != settings["prompt"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--segment", "a cat", "1"], "--enhance-prompt rewrites one whole prompt; it does not go with --segment"),
        (["--prompt", ""], "--enhance-prompt needs a prompt; give --prompt TEXT"),
    ],
)
def test_what_cannot_be_enhanced_is_refused(instruct_gemma, tmp_path, capsys, flags, complaint) -> None:
    clip = [flag for flag in CLIP if flag not in ("--num-frames", "9")]
    flags = [*clip, *flags, "--text-encoder", str(instruct_gemma), "--output", str(tmp_path / "a.mp4")]
    assert main([*flags, "--enhance-prompt"]) == 1
    assert capsys.readouterr().err == f"mlx_ltx.generate: {complaint}\n"


def test_a_base_model_is_refused_before_any_work(instruct_gemma, tmp_path, capsys) -> None:
    base = Path(shutil.copytree(instruct_gemma, tmp_path / "tiny-pt"))
    (base / "chat_template.jinja").unlink()
    assert command(base, "--prompt", PROMPT, "--enhance-prompt", "--output", tmp_path / "a.mp4") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no chat template, so it is not an instruction-tuned Gemma 3" in line
