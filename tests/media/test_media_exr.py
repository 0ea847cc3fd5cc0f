"""EXR stills and folders of frames, and what their pixels mean to a network."""

import sys

import numpy as np
import pytest

from mlx_ltx.errors import UserError
from mlx_ltx.media.color import LogCurve, Primaries
from mlx_ltx.media.exr import ExrFolder, exr_frames, exr_size, is_exr, read_exr, read_exr_clip, write_exr
from mlx_ltx.media.fit import fit_pixels
from mlx_ltx.media.hdr import HdrSpace, master_light, prepare_exr

OpenEXR = pytest.importorskip("OpenEXR")


def bright(height=6, width=10, seed=0):
    """Light far beyond 1, in values that half floats hold exactly."""
    return np.exp2(np.random.default_rng(seed).uniform(-8, 7, (height, width, 3))).astype(np.float16).astype(np.float32)


def save(path, header=None, **channels):
    channels = {name: np.ascontiguousarray(values) for name, values in channels.items()}
    OpenEXR.File({"type": OpenEXR.scanlineimage, **(header or {})}, channels).write(str(path))


def test_light_beyond_one_survives(tmp_path):
    path, pixels = tmp_path / "plate.exr", bright()
    assert pixels.max() > 50
    write_exr(path, pixels, Primaries.ACESCG, "ACEScg")
    assert np.array_equal(read_exr(path), pixels)
    assert exr_size(path) == (6, 10)
    header = OpenEXR.File(str(path)).header()
    assert header["colorSpace"] == "ACEScg"
    assert np.allclose(header["chromaticities"], (0.713, 0.293, 0.165, 0.830, 0.128, 0.044, 0.32168, 0.33767))
    assert OpenEXR.File(str(path)).channels()["RGB"].pixels.dtype == np.float16
    write_exr(path, np.array([[[1e9, -1e9, 3]]]), Primaries.REC709, "sRGB", force=True)
    assert read_exr(path).tolist() == [[[65504, -65504, 3]]]  # the ends of half floats, not infinity


def test_other_programs_files(tmp_path):
    path, pixels = tmp_path / "a.exr", bright()
    alpha = np.ones((6, 10), np.float32)
    save(path, RGBA=np.dstack([pixels, alpha]), Z=alpha)
    assert np.array_equal(read_exr(path), pixels)
    save(path, Y=pixels[..., 0], A=alpha)
    assert np.array_equal(read_exr(path), np.repeat(pixels[..., :1], 3, 2))
    save(path, **{name: pixels[..., number] for number, name in enumerate("RGB")})
    assert np.array_equal(read_exr(path), pixels)


def test_the_display_window_is_what_is_seen(tmp_path):
    path, pixels = tmp_path / "a.exr", bright()

    def window(left, top, right, bottom):
        return (np.array([left, top], np.int32), np.array([right, bottom], np.int32))

    save(path, {"dataWindow": window(-1, -2, 8, 3), "displayWindow": window(0, 0, 7, 2)}, RGB=pixels)  # overscan
    assert np.array_equal(read_exr(path), pixels[2:5, 1:9])
    save(path, {"dataWindow": window(2, 1, 11, 6), "displayWindow": window(0, 0, 15, 7)}, RGB=pixels)  # a part only
    expected = np.zeros((8, 16, 3), np.float32)
    expected[1:7, 2:12] = pixels
    assert np.array_equal(read_exr(path), expected)
    assert exr_size(path) == (8, 16)


def test_what_cannot_be_read(tmp_path):
    pixels = bright()
    save(tmp_path / "depth.exr", Z=pixels[..., 0], N=pixels[..., 1])
    save(tmp_path / "nan.exr", RGB=np.where(pixels > 10, np.nan, pixels).astype(np.float32))
    write_exr(tmp_path / "good.exr", np.tile(pixels, (40, 40, 1)), Primaries.REC709, "sRGB")
    (tmp_path / "cut.exr").write_bytes((tmp_path / "good.exr").read_bytes()[:5000])
    (tmp_path / "text.exr").write_text("hello" * 100)
    (tmp_path / "folder.exr").mkdir()
    for name, message in {
        "depth.exr": "no channels R, G and B, only N, Z",
        "nan.exr": r"\d+ of its values",
        "cut.exr": "not an EXR file that can be read",
        "text.exr": "not an EXR file that can be read",
        "none.exr": "no such file",
        "folder.exr": "is a folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            read_exr(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_frame_folders(tmp_path):
    folder, frames = tmp_path / "new" / "clip_exr", np.stack([bright(seed=n) for n in range(12)])
    with ExrFolder(folder, Primaries.REC709, "sRGB") as writer:
        writer.write_frames(frames[:5])
        writer.write_frames(frames[5:])
        assert not folder.exists()
    assert [file.name for file in exr_frames(folder)] == [f"frame_{n:05d}.exr" for n in range(12)]
    assert np.array_equal(np.stack([*read_exr_clip(folder)]), frames)
    assert np.array_equal(np.stack([*read_exr_clip(folder, 3, first=7)]), frames[7:10])
    assert [file.name for file in folder.parent.iterdir()] == ["clip_exr"]
    assert is_exr(folder)
    assert is_exr(folder / "frame_00000.exr")
    assert not is_exr(tmp_path)
    assert not is_exr(tmp_path / "a.png")


def test_a_failed_folder_leaves_nothing(tmp_path):
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), ExrFolder(tmp_path / "a", Primaries.REC709, "sRGB") as writer:  # noqa: PT012
            writer.write_frames(bright()[None])
            raise error
    with pytest.raises(ValueError, match="no frames"), ExrFolder(tmp_path / "a", Primaries.REC709, "sRGB"):
        pass
    with pytest.raises(ValueError, match="not open"):
        ExrFolder(tmp_path / "a", Primaries.REC709, "sRGB").write_frames(bright()[None])
    with pytest.raises(ValueError, match="frames must be"), ExrFolder(tmp_path / "a", Primaries.REC709, "s") as writer:
        writer.write_frames(bright())
    assert not list(tmp_path.iterdir())


def test_a_frame_that_cannot_be_written(tmp_path, monkeypatch):
    def full(self, name):
        raise RuntimeError("Cannot write file\nNo space left on device.")

    folder = ExrFolder(tmp_path / "a", Primaries.REC709, "sRGB")
    monkeypatch.setattr(OpenEXR.File, "write", full)
    with pytest.raises(UserError, match="cannot be written") as caught, folder as writer:
        writer.write_frames(bright()[None])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_frame_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / "._frame_0.exr").write_text("what macOS leaves behind")
    with pytest.raises(UserError, match=r"holds no \.exr frames"):
        read_exr_clip(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_exr_clip(tmp_path / "none")
    for number, shape in enumerate([(4, 6), (4, 6), (6, 4)]):
        write_exr(tmp_path / f"{number}.exr", bright(*shape), Primaries.REC709, "sRGB")
    with pytest.raises(UserError, match=r"2\.exr: is 4x6 pixels, the first frame is 6x4"):
        list(read_exr_clip(tmp_path))
    with pytest.raises(UserError, match="only 2 frames from number 1 on, 3 are needed"):
        read_exr_clip(tmp_path, 3, first=1)
    with pytest.raises(UserError, match="only 0 frames"):
        read_exr_clip(tmp_path, first=3)
    with pytest.raises(ValueError, match="cannot read"):
        read_exr_clip(tmp_path, 0)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    (tmp_path / "a.exr").write_bytes(b"")
    for use in (
        lambda: read_exr(tmp_path / "a.exr"),
        lambda: write_exr(tmp_path / "b.exr", bright(), Primaries.REC709, "sRGB"),
        lambda: ExrFolder(tmp_path / "c", Primaries.REC709, "sRGB"),
    ):
        with pytest.raises(UserError, match=r'pip install "mlx_ltx\[hdr\]"'):
            use()


def test_wrong_names_and_shapes(tmp_path):
    with pytest.raises(UserError, match=r"\.exr"):
        write_exr(tmp_path / "a.png", bright(), Primaries.REC709, "sRGB")
    with pytest.raises(ValueError, match="picture"):
        write_exr(tmp_path / "a.exr", bright()[..., :2], Primaries.REC709, "sRGB")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("space", HdrSpace)
def test_through_a_network_that_changes_nothing(tmp_path, space):
    pixels = np.minimum(bright(8, 8), 40)
    if space is HdrSpace.ACESCCT:
        pixels = LogCurve.ACESCCT.compress(pixels)
    seen = space.to_network(pixels)
    assert (seen.dtype, seen.shape) == (np.float32, (8, 8, 3))
    assert -1 <= seen.min() <= seen.max() <= 1
    back = space.from_network(seen)
    assert np.abs(back - pixels).max() < 3e-4 * pixels.max()
    with space.folder(tmp_path / "out") as folder:
        folder.write_frames(back[None])
    assert np.abs(next(read_exr_clip(tmp_path / "out")) - pixels).max() < 2e-3 * pixels.max()
    header = OpenEXR.File(str(tmp_path / "out" / "frame_00000.exr")).header()
    assert header["colorSpace"] == {"srgb_linear": "sRGB", "acescg": "ACEScg", "acescct": "ACEScct"}[space.value]


def test_the_same_light_in_each_space():
    """Rec.709 light, the same as ACEScg light, and as ACEScct codes: one picture for the network, one master."""
    light = np.minimum(bright(8, 8), 40)
    seen = HdrSpace.SRGB_LINEAR.to_network(light)
    master = master_light(seen)
    assert np.abs(master - light).max() < 3e-4 * light.max()
    for space in (HdrSpace.ACESCG, HdrSpace.ACESCCT):
        assert np.abs(space.to_network(space.from_network(seen)) - seen).max() < 1e-4
    assert np.array_equal(HdrSpace.ACESCCT.to_network(np.array([-3.0, 0, 0.5, 1, 7])), [-1, -1, 0, 1, 1])
    assert np.abs(master_light(LogCurve.LOGC3.from_linear(light) * 2 - 1, LogCurve.LOGC3) - light).max() < 0.02


def test_a_plate_as_conditioning(tmp_path):
    pixels = bright(20, 30)
    write_exr(tmp_path / "plate.exr", pixels, Primaries.REC709, "sRGB")
    prepared = prepare_exr(tmp_path / "plate.exr", 16, 16, HdrSpace.SRGB_LINEAR)
    assert np.array_equal(prepared, HdrSpace.SRGB_LINEAR.to_network(fit_pixels(pixels, 16, 16)))
    padded = prepare_exr(tmp_path / "plate.exr", 32, 32, HdrSpace.SRGB_LINEAR, "reflect")
    assert np.array_equal(padded[:20, :30], HdrSpace.SRGB_LINEAR.to_network(pixels))
