"""Text that is streamed: on the terminal as it comes, in its own lines, and where it was asked for."""

import io
import json

import pytest

from mlx_ltx import display
from mlx_ltx.events import MemorySeen, Phase, PhaseStarted, Progress, PromptEnhanced, TextStreamed, Warned

EVENTS = [
    PhaseStarted(0, Phase("enhance-prompt", "Enhancing the prompt", 512, "tokens")),
    Progress("enhance-prompt", 0.5, 512),
    TextStreamed("enhance-prompt", "A red"),
    TextStreamed("enhance-prompt", " kite – été"),
    Progress("enhance-prompt", 2, 512),
    PromptEnhanced("A red kite – été", "kite"),
    Warned("it was cut off"),
    MemorySeen("enhance-prompt", 1, 2),
]
TEXT = "A red kite – été\n"


def play(screen: display.Display) -> None:
    for event in EVENTS:
        screen.show(event)
    screen.close()


def test_each_piece_is_shown_at_once(capsys) -> None:
    screen = display.Lines()
    screen.show(EVENTS[2])
    assert capsys.readouterr().err == "A red"
    screen.show(EVENTS[3])
    assert capsys.readouterr().err == " kite – été"


def test_lines_give_text_lines_of_its_own(capsys) -> None:
    play(display.Lines())
    assert capsys.readouterr().err == f"Enhancing the prompt\n{TEXT}mlx_ltx: it was cut off\n"


def test_bars_make_room_for_the_text(capsys) -> None:
    play(display.Bars())
    shown = capsys.readouterr().err
    assert "Enhancing the prompt" in shown
    after_the_bar = shown[shown.rindex("Enhancing the prompt") :]
    assert f"\n{TEXT}mlx_ltx: it was cut off\n" in after_the_bar


def test_quiet_shows_no_text(capsys) -> None:
    play(display.Quiet())
    assert capsys.readouterr() == ("", "mlx_ltx: it was cut off\n")


@pytest.mark.parametrize("kind", [display.Quiet, display.Lines, display.Bars])
def test_text_goes_where_it_was_asked_for(kind, capsys) -> None:
    stream = io.StringIO()
    play(kind(text=stream))
    assert stream.getvalue() == TEXT
    assert "kite" not in capsys.readouterr().err


def test_an_interrupted_text_ends_its_line(capsys) -> None:
    for screen in (display.Lines(), display.Bars()):
        screen.show(EVENTS[2])
        screen.close()
        assert capsys.readouterr().err == "A red\n"


def test_json_lines_hold_the_pieces_and_the_result(capsys) -> None:
    play(display.choose(quiet=False, as_json=True, text=io.StringIO()))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == [type(event).__name__ for event in EVENTS]
    assert "".join(line["text"] for line in lines if line["event"] == "TextStreamed") + "\n" == TEXT
    assert lines[5] == {"event": "PromptEnhanced", "prompt": TEXT.strip(), "original": "kite"}


def test_the_choice_keeps_the_place_of_the_text() -> None:
    stream = io.StringIO()
    for quiet in (True, False):
        play(display.choose(quiet=quiet, as_json=False, text=stream))
    assert stream.getvalue() == TEXT * 2
