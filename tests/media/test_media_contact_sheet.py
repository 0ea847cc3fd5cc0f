"""Contact sheets, looked at in pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_ltx.errors import UserError
from mlx_ltx.media.contact_sheet import ContactSheet, evenly_spaced, save_sheets


def flat(levels, height=180, width=320):
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])


@given(st.integers(1, 500), st.integers(1, 40))
def test_spacing(frames, cells):
    chosen = evenly_spaced(frames, cells)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(frames, cells)
    assert all(0 <= number < frames for number in chosen)
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (0, frames - 1)
        assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_shows_the_right_frames_in_reading_order():
    frames = ContactSheet(121, 24, cells=6)
    frames.add(flat(range(0, 121)))
    sheet = np.asarray(frames.draw(columns=3, labels=False))
    assert sheet.shape == (2 * 180 + 3 * 8, 3 * 320 + 4 * 8, 3)
    centres = [sheet[8 + 90 + row * 188, 8 + 160 + column * 328, 0] for row in range(2) for column in range(3)]
    assert centres == [0, 24, 48, 72, 96, 120]


def test_a_stream_in_chunks_gives_the_same_sheet_as_the_clip():
    frames = flat(range(0, 250, 5), 90, 160)
    streamed, whole = ContactSheet(50, 25), ContactSheet(50, 25)
    for chunk in np.array_split(frames, 7):
        streamed.add(chunk)
    whole.add(frames)
    assert np.array_equal(np.asarray(streamed.draw()), np.asarray(whole.draw()))


def test_labels_are_drawn_below_the_frames():
    sheet = ContactSheet(2, 1)
    sheet.add(flat([0, 0]))
    plain, labelled = (np.asarray(sheet.draw(columns=2, labels=labels)) for labels in (False, True))
    assert labelled.shape[0] == plain.shape[0] + 20
    strips = [labelled[188:208, left : left + 320] for left in (8, 336)]
    assert all(strip.max() > 150 for strip in strips)
    assert not np.array_equal(*strips)  # 0.00 s and 1.00 s


def test_the_waveform_spans_the_picture():
    """Two seconds of picture, one second of sound that is loud on its first half only."""
    sound = np.zeros((1000, 2), np.float32)
    sound[:500] = np.resize([0.9, -0.9], 500)[:, None]
    silent, sheet = ContactSheet(48, 24, cells=4), ContactSheet(48, 24, cells=4, waveform=sound, rate=1000)
    for each in (silent, sheet):
        each.add(flat(range(48), 90, 160))
    image = np.asarray(sheet.draw(labels=False)).astype(int)
    bare = np.asarray(silent.draw(labels=False)).shape[0]
    assert image.shape[0] == bare + 104
    blue = (image[bare : bare + 96, 8:-8, 2] > 150).sum(0)  # lit pixels per column
    quarter = len(blue) // 4
    assert blue[: quarter - 2].min() > 60
    assert blue[quarter + 2 :].max() <= 2


@pytest.mark.parametrize("shape", [(16, 24), (8, 200), (400, 30), (1080, 1920)])
def test_any_size_of_frame(shape):
    sheet = ContactSheet(5, 24)
    sheet.add(flat(range(5), *shape))
    width, height = sheet.draw().size
    assert 60 < width < 2400
    assert 20 < height < 2400


def test_a_stream_that_ends_early_shows_what_came():
    sheet = ContactSheet(100, 24, cells=10)
    sheet.add(flat(range(12), 90, 160))
    assert sheet.draw(columns=1, labels=False).size == (176, 2 * 98 + 8)


def test_misuse(tmp_path):
    for arguments in ((0, 24), (5, 0), (5, 24, 0)):
        with pytest.raises(ValueError):
            ContactSheet(*arguments)
    sheet = ContactSheet(5, 24)
    with pytest.raises(ValueError, match="no frames"):
        sheet.draw()
    sheet.add(flat(range(5)))
    with pytest.raises(ValueError, match="columns"):
        sheet.draw(columns=0)
    with pytest.raises(ValueError, match="rate"):
        ContactSheet(5, 24, waveform=np.zeros((10, 2)))
    with pytest.raises(UserError, match=r"\.png"):
        save_sheets([sheet], tmp_path / "sheet.jpg")
    save_sheets([sheet], tmp_path / "sheet.png")
    with pytest.raises(UserError, match="--force"):
        save_sheets([sheet], tmp_path / "sheet.png")


def test_several_clips_stand_below_each_other_under_their_titles(tmp_path):
    """Frames of two levels; the second clip's title is too long for its line."""
    sheets = [ContactSheet(3, 24, title="one"), ContactSheet(3, 24, title="two " * 500)]
    for level, sheet in zip((50, 200), sheets, strict=True):
        sheet.add(flat([level] * 3))
    save_sheets(sheets, tmp_path / "sheet.png")
    image = np.asarray(Image.open(tmp_path / "sheet.png"))
    single = sheets[0].draw().height
    assert image.shape[0] == 2 * single
    assert image[24 + 8 + 90, 8 + 160, 0] == 50
    assert image[single + 24 + 8 + 90, 8 + 160, 0] == 200
    assert image[single : single + 24, :-8].max() > 150
    assert image[single : single + 30, -8:].max() < 60
