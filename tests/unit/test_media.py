"""Clips written, read back, broken off half-way and looked at."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ditkit import media
from ditkit.errors import DitkitError, OutputError, StateError
from ditkit.media import files, write
from ditkit.shapes import draw

FORMATS = (".mp4", ".gif", ".png", ".npz")
MANIFEST = {
    "prompt": 'ein roter Kreis é \U0001f534 红色的圆 "quoted"\n',
    "seed": 7,
    "sizes": [1, 2.5, None],
    "b": {"a": True},
}


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return draw.draw(draw.Scene("circle", "red", "left", "navy", 48, 30, 10, 25))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_clip_and_its_manifest_come_back(tmp_path, clip, suffix):
    path = tmp_path / "new" / "folder" / f"clip{suffix}"
    written = media.write_video(path, clip, 16, MANIFEST)
    video, fps = media.read_video(path)
    assert (video.shape, video.dtype, fps) == (clip.shape, np.uint8, 16.0)
    if suffix in (".png", ".npz"):
        np.testing.assert_array_equal(video, clip)
    else:
        assert psnr(video, clip) > {".mp4": 30, ".gif": 50}[suffix]
    assert media.read_manifest(path) == media.read_manifest(written) == MANIFEST
    assert media.read_manifest(path.with_suffix(".json")) == MANIFEST
    shutil.move(written, tmp_path / "moved" if suffix == ".png" else tmp_path / f"moved{suffix}")
    assert media.read_manifest(tmp_path / f"moved{suffix}") == MANIFEST, "the file itself carries it"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_frames_give_the_same_bytes(tmp_path, clip, suffix):
    def content(name):
        path = media.write_video(tmp_path / f"{name}{suffix}", clip, 16, MANIFEST)
        return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else path.read_bytes()

    assert content("a") == content("b")
    code = f"""
        import sys, numpy as np
        from ditkit import media
        media.write_video({str(tmp_path / f"c{suffix}")!r}, np.load(sys.argv[1]), 16, {MANIFEST!r})"""
    np.save(tmp_path / "clip.npy", clip)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "clip.npy"], check=True, env=environment())
    other = tmp_path / ("c" if suffix == ".png" else f"c{suffix}")
    fresh = {p.name: p.read_bytes() for p in other.iterdir()} if other.is_dir() else other.read_bytes()
    assert fresh == content("a"), "another process makes the same file"


@pytest.mark.slow
@pytest.mark.parametrize("crf", [16, 40])
def test_equal_frames_give_equal_mp4s_each_time(crf):
    """Sizes and movement at which x264 gave eight kinds of forty."""
    rows, columns = np.mgrid[0:96, 0:160]
    grain = np.random.default_rng(1)
    frames = [
        np.stack([columns * 3 + 5 * t, rows * 2 + 3 * t, (columns + rows) * 2 - 7 * t], -1) % 256
        + grain.integers(-9, 9, (96, 160, 3))
        for t in range(13)
    ]
    video = np.stack(frames).clip(0, 255).astype(np.uint8)
    kinds = {hashlib.sha256(write.mp4(video, {"fps": 16, "frames": 13}, crf)).hexdigest() for _ in range(15)}
    assert len(kinds) == 1


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_manifest_of_200_kilobytes(tmp_path, clip, suffix):
    manifest = {"graph": [f"节点 {i} é" for i in range(12_000)]}
    assert len(json.dumps(manifest, ensure_ascii=False).encode()) > 200_000
    media.write_video(tmp_path / f"clip{suffix}", clip, 16, manifest)
    assert media.read_manifest(tmp_path / f"clip{suffix}") == manifest
    assert media.read_video(tmp_path / f"clip{suffix}")[0].shape == clip.shape


def test_mp4_is_what_the_docs_say(tmp_path, clip):
    import av

    path = media.write_video(tmp_path / "clip.mp4", clip, 24000 / 1001, MANIFEST)
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)  # BT.709, limited
        assert (float(stream.average_rate), stream.frames) == (24000 / 1001, len(clip))
        assert json.loads(container.metadata["ditkit"])["frames_sha256"] == media.frames_sha256(clip)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index stands in front"
    assert psnr(media.read_video(path)[0], clip) > 30


@pytest.mark.parametrize("color", [*draw.COLORS.values(), *draw.BACKGROUNDS.values()])
def test_mp4_keeps_a_plain_colour(color):
    video = np.empty((5, 32, 48, 3), np.uint8)
    video[:] = color
    import av

    data = write.mp4(video, {"fps": 16})
    with av.open(io.BytesIO(data)) as container:
        seen = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert np.abs(seen.astype(int) - video).max() <= 3


def test_crf_trades_size_for_quality(tmp_path, clip):
    sizes, qualities = [], []
    for crf in (4, 16, 40):
        path = media.write_video(tmp_path / "clip.mp4", clip, 16, crf=crf)
        sizes.append(path.stat().st_size)
        qualities.append(psnr(media.read_video(path)[0], clip))
    assert sizes == sorted(sizes, reverse=True)
    assert qualities == sorted(qualities, reverse=True)
    with pytest.raises(OutputError, match=r"0 .* to 51"):
        media.write_video(tmp_path / "clip.mp4", clip, 16, crf=52)
    with pytest.raises(OutputError, match="only"):
        media.write_video(tmp_path / "clip.gif", clip, 16, crf=20)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".npz"])
def test_odd_sizes_and_single_frames(tmp_path, clip, suffix):
    odd = clip[:1, :63, :37]
    media.write_video(tmp_path / f"clip{suffix}", odd, 16)
    assert media.read_video(tmp_path / f"clip{suffix}")[0].shape == odd.shape


def test_odd_mp4_is_refused_early_and_clearly(tmp_path, clip):
    with pytest.raises(OutputError, match=r"even width and height, and this is 37 x 64.*Choose .gif"):
        media.write_video(tmp_path / "clip.mp4", clip[:, :, :37], 16)
    with pytest.raises(OutputError, match="even"):
        media.check_writable(tmp_path / "clip.mp4", width=64, height=63)
    assert left_in(tmp_path) == []
    media.write_video(tmp_path / "clip.mp4", clip[:1, :2, :2], 16)
    assert media.read_video(tmp_path / "clip.mp4")[0].shape == (1, 2, 2, 3)


def test_gif_loops_keeps_its_length_and_still_frames(tmp_path, clip):
    from PIL import Image, ImageSequence

    with Image.open(media.write_video(tmp_path / "a.gif", clip, 16)) as image:
        assert image.info["loop"] == 0
        assert sum(f.info["duration"] for f in ImageSequence.Iterator(image)) == 810  # 13 / 16 s = 0.8125 s
    still = np.concatenate([clip[:1]] * 5 + [clip[5:6]] * 4 + [clip[9:10]])
    media.write_video(tmp_path / "b.gif", still, 12, MANIFEST)
    seen, fps = media.read_video(tmp_path / "b.gif")
    assert fps == 12
    assert len(seen) == 10
    changes = [bool((seen[i] != seen[i + 1]).any()) for i in range(9)]
    assert changes == [False] * 4 + [True] + [False] * 3 + [True]
    with pytest.raises(OutputError, match="at most 50"):
        media.write_video(tmp_path / "c.gif", clip, 60)


def test_gif_dithers_what_255_colours_cannot_hold_without_flicker(tmp_path):
    rows, columns = np.mgrid[0:384, 0:384] / 383
    frame = (np.stack([rows, columns, 1 - rows * columns], -1) * 255).astype(np.uint8)
    media.write_video(tmp_path / "a.gif", np.stack([frame] * 3), 10)
    seen, _ = media.read_video(tmp_path / "a.gif")
    assert (seen == seen[0]).all()

    def smooth(image):  # as the eye does
        return image.reshape(48, 8, 48, 8, 3).mean((1, 3))

    assert np.abs(smooth(seen[0].astype(float)) - smooth(frame.astype(float))).mean() < 1.5  # 2.6 undithered


def test_a_foreign_gif_and_mp4_are_read_too(tmp_path, clip):
    import av
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in clip]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=50)
    video, fps = media.read_video(tmp_path / "a.gif")
    assert video.shape == clip.shape
    assert fps == 20
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    video, fps = media.read_video(tmp_path / "a.mp4")
    assert video.shape == clip.shape
    assert fps == 8
    for name in ("a.gif", "a.mp4"):
        with pytest.raises(StateError, match="carries none"):
            media.read_manifest(tmp_path / name)


# ---- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_manifest_is_said_and_the_sidecar_is_not_taken_silently(tmp_path, clip, suffix):
    media.write_video(tmp_path / f"a{suffix}", clip, 16, MANIFEST)
    media.write_video(tmp_path / f"b{suffix}", clip, 16)
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(StateError, match="carries none"):
        media.read_manifest(tmp_path / f"b{suffix}")
    assert media.read_manifest(tmp_path / "b.json") == MANIFEST


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npz", "a.png", "a.json"])
def test_damaged_missing_and_unknown_files(tmp_path, name):
    with pytest.raises(StateError, match="no such file"):
        media.read_manifest(tmp_path / name)
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(StateError):
        media.read_manifest(tmp_path / name)
    with pytest.raises(StateError):
        media.read_video(tmp_path / name)
    (tmp_path / "a.txt").touch()
    with pytest.raises(StateError, match="not known"):
        media.read_video(tmp_path / "a.txt")


def test_a_folder_of_frames_that_lost_one(tmp_path, clip):
    folder = media.write_video(tmp_path / "a.png", clip, 16)
    (folder / "0004.png").unlink()
    with pytest.raises(StateError, match="12 frames and a card for 13"):
        media.read_video(folder)
    (folder / "0000.png").unlink()
    with pytest.raises(StateError, match="no card"):
        media.read_video(folder)


# ---- what cannot be written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "clip.avi", "clip.mp", "clip.jpg"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path, clip, name):
    for act in (lambda: media.check_writable(tmp_path / name), lambda: media.write_video(tmp_path / name, clip, 16)):
        with pytest.raises(OutputError, match=r"Use \.mp4, \.gif, \.png, \.npz"):
            act()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (0, 8, 8, 3), (8, 8, 3)])
def test_only_frames_are_written(tmp_path, shape):
    for video in (np.zeros(shape, np.uint8), np.zeros((2, 8, 8, 3), np.float32), [1]):
        with pytest.raises(OutputError, match=r"uint8 \[T, H, W, 3\]"):
            media.write_video(tmp_path / "a.npz", video, 16)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_must_be_one(tmp_path, clip, fps):
    with pytest.raises(OutputError, match="positive"):
        media.write_video(tmp_path / "a.npz", clip, fps)


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, "\ud800"])
def test_a_manifest_must_be_json(tmp_path, clip, value):
    with pytest.raises(OutputError, match="not JSON"):
        media.write_video(tmp_path / "a.npz", clip, 16, {"key": value})
    assert left_in(tmp_path) == []


def test_paths_that_cannot_be(tmp_path, clip):
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        media.check_writable(tmp_path / "dir.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file exists|not a directory"):
        media.check_writable(tmp_path / "file" / "clip.mp4")
    with pytest.raises(OutputError, match="it is a file"):
        media.check_writable(tmp_path / "file.png")
    with pytest.raises(OutputError, match="too long"):
        media.write_video(tmp_path / f"{'x' * 300}.npz", clip, 16)
    with pytest.raises(OutputError, match="too long"):
        media.check_writable(tmp_path / f"{'x' * 300}.npz")
    assert left_in(tmp_path) == ["dir.mp4", "file"]


def test_a_persons_own_json_is_never_overwritten(tmp_path, clip):
    (tmp_path / "clip.json").write_text('{"seed": 3}')
    for act in (media.check_writable, lambda path: media.write_video(path, clip, 16, MANIFEST)):
        with pytest.raises(OutputError, match=r"clip\.json, which is something else"):
            act(tmp_path / "clip.mp4")
    assert (tmp_path / "clip.json").read_text() == '{"seed": 3}'
    assert left_in(tmp_path) == ["clip.json"]


def test_frames_replace_older_frames_but_no_other_folder(tmp_path, clip):
    media.write_video(tmp_path / "a.png", clip, 16)
    media.write_video(tmp_path / "a.png", clip[:4], 16)
    assert left_in(tmp_path) == ["a", *(f"a/000{i}.png" for i in range(4))]
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"other files \(notes.txt\)"):
        media.write_video(tmp_path / "a.png", clip, 16)
    assert len(left_in(tmp_path / "a")) == 5


def test_a_new_clip_without_manifest_takes_the_old_card_away(tmp_path, clip):
    media.write_video(tmp_path / "a.mp4", clip, 16, MANIFEST)
    media.write_video(tmp_path / "a.mp4", clip, 16)
    assert left_in(tmp_path) == ["a.mp4"]


def environment() -> dict[str, str]:
    source = str(Path(media.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


FULL = """
    import resource, sys
    import numpy as np
    from pathlib import Path
    from ditkit import media
    from ditkit.errors import OutputError
    path, limit = Path(sys.argv[1]), int(sys.argv[2])
    video = np.random.default_rng(0).integers(0, 6, (12, 128, 128, 3), dtype=np.uint8) * 50
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        media.write_video(path, video, 16, {"seed": 1})
    except OutputError as error:
        print(error)
    else:
        sys.exit("it was written")
"""


def run_full(path: Path, limit: int) -> str:
    """Write a clip of 100 KB and more in a process that may not; the message that it ends with."""
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".npz"])
def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path, clip, suffix):
    media.write_video(tmp_path / f"clip{suffix}", clip, 16, MANIFEST)
    before = left_in(tmp_path)
    limit = 70_000 if suffix != ".png" else 20_000  # a single frame is smaller; the first block still fits
    message = run_full(tmp_path / f"clip{suffix}", limit)
    assert "file too large" in message
    assert "has room" in message
    assert left_in(tmp_path) == before
    assert media.read_manifest(tmp_path / f"clip{suffix}") == MANIFEST
    assert media.read_video(tmp_path / f"clip{suffix}")[0].shape == clip.shape


def test_check_writable_notices_a_disk_without_room(tmp_path):
    code = """
        import resource, sys
        from ditkit import media
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            media.check_writable(sys.argv[1])
        except media.write.OutputError as error:
            print(error)"""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "a.mp4"],
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    assert "file too large" in done.stdout
    assert left_in(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or os.geteuid() != 0:
        pytest.skip("only root can mount a disk to fill")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=112k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("this machine does not let us mount a disk to fill")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk(tiny_disk, suffix):
    message = run_full(tiny_disk / f"clip{suffix}", 0)
    assert "no space left on device" in message
    assert left_in(tiny_disk) == []


def test_a_broken_off_write_of_two_leaves_neither(tmp_path):
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way" / "x").touch()
    with pytest.raises(OutputError):
        files.write_together({tmp_path / "a": b"1", tmp_path / "in the way" / "x" / "b": b"2"})
    assert left_in(tmp_path) == ["in the way", "in the way/x"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_together({tmp_path / "a": b"1"})
    assert left_in(tmp_path) == []


# ---- pixels -------------------------------------------------------------------------------------------------------


def test_to_uint8_truncates_like_the_official_code_and_rounds_like_diffusers():
    import torch
    from diffusers.video_processor import VideoProcessor

    video = torch.rand(1, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    levels = (torch.arange(256) / 255 * 2 - 1).reshape(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)
    for x in (video, levels):
        # The arithmetic of ``cache_video``: clamp, torchvision's make_grid(normalize=True, value_range=(-1, 1)), byte.
        official = ((x.clamp(-1, 1) - -1) / 2 * 255).type(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
        np.testing.assert_array_equal(media.to_uint8(x), official)
        theirs = VideoProcessor(vae_scale_factor=8).postprocess_video(x, output_type="pil")[0]
        np.testing.assert_array_equal(
            media.to_uint8(x, rounding="diffusers")[0], np.stack([np.array(i) for i in theirs])
        )
    assert (media.to_uint8(video) != media.to_uint8(video, rounding="diffusers")).any()


def test_to_uint8_of_any_float_and_any_leading_axes():
    import torch

    video = torch.rand(3, 2, 4, 5) * 2 - 1
    assert media.to_uint8(video).shape == (2, 4, 5, 3)
    assert media.to_uint8(video[None, None]).shape == (1, 1, 2, 4, 5, 3)
    np.testing.assert_array_equal(media.to_uint8(video.numpy()), media.to_uint8(video))
    half = video.bfloat16()
    np.testing.assert_array_equal(media.to_uint8(half.requires_grad_()), media.to_uint8(half.float()))
    assert media.to_uint8(np.array([-1.0, 0, 1]).repeat(2).reshape(3, 1, 1, 2)).tolist() == [[[[0, 127, 255]] * 2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_to_uint8_refuses_what_is_no_colour(bad):
    video = np.zeros((3, 4, 2, 2), np.float32)
    video[1, 2, 0, 1] = bad
    with pytest.raises(DitkitError, match="1 values of frame 2 are NaN or infinite") as caught:
        media.to_uint8(video)
    assert caught.value.exit_code == 1, "no mistake of the user"


def test_to_uint8_refuses_other_shapes_types_and_roundings():
    for video in (
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((3, 2, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.float32),
    ):
        with pytest.raises(OutputError, match=r"\[..., 3, T, H, W\]"):
            media.to_uint8(video)
    with pytest.raises(OutputError, match="wan, diffusers"):
        media.to_uint8(np.zeros((3, 2, 4, 4), np.float32), rounding="nearest")


def test_frames_sha256_sees_values_shape_and_type(clip):
    changed = clip.copy()
    changed[3, 4, 5, 1] ^= 1
    some = [clip, changed, clip.reshape(13, 32, 128, 3), clip.view(np.int8), clip[:12], clip[::-1]]
    assert len({media.frames_sha256(video) for video in some}) == len(some)
    assert media.frames_sha256(np.asfortranarray(clip)) == media.frames_sha256(clip)
    assert media.frames_sha256(np.zeros((1, 1, 1, 3), np.uint8)) == (
        hashlib.sha256(b"|u1 [1, 1, 1, 3]\n\0\0\0").hexdigest()
    )


# ---- to look at ---------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_the_frames(tmp_path, clip):
    from PIL import Image

    sheet = media.contact_sheet(clip, tmp_path / "x" / "sheet.png", "a title", "seed 7", columns=4, fps=16)
    with Image.open(tmp_path / "x" / "sheet.png") as image:
        pixels = np.array(image)
    np.testing.assert_array_equal(pixels, np.array(sheet))
    for index in (0, 12):  # enlarged by 3, every pixel a block, somewhere in the sheet
        block = clip[index].repeat(3, 0).repeat(3, 1)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (192, 192, 3))[:, :, 0, ::37, ::37]
        assert (windows == block[::37, ::37]).all((2, 3, 4)).any()
    assert left_in(tmp_path / "x") == ["sheet.png"]


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 480, 832, 3), (81, 16, 8, 3), (5, 300, 100, 3)])
def test_contact_sheet_of_any_size_with_long_words(shape):
    video = np.zeros(shape, np.uint8)
    sheet = media.contact_sheet(video, None, "word " * 400 + "x" * 500, "c" * 900)
    assert 300 < sheet.width < 1200
    assert sheet.height < 1200
    edge = np.array(sheet)[:, -20:]
    assert (edge == edge[0, 0]).all(), "no text runs over the margin"


def test_contact_sheet_refuses_nonsense(tmp_path, clip):
    for kwargs, words in (
        ({"path": tmp_path / "a.jpg"}, ".png"),
        ({"columns": 0}, "1 x 1"),
        ({"font": tmp_path / "none.ttf"}, "ttf"),
    ):
        with pytest.raises(OutputError, match=words):
            media.contact_sheet(clip, **kwargs)


def test_preview_blocks_are_two_pixels_a_character():
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[0], frame[1] = (255, 0, 0), (0, 0, 255)
    text = media.preview_blocks(frame, 4)
    assert text.plain == "\u2580" * 4 + "\n" + "\u2580" * 4
    style = text.spans[0].style
    assert (style.color.name, style.bgcolor.name) == ("#ff0000", "#0000ff")
    assert len(media.preview_blocks(np.zeros((480, 832, 3), np.uint8), 40).plain.splitlines()) == 12
    assert media.preview_blocks(np.zeros((2, 2, 3), np.uint8), 40).plain == "\u2580\u2580"


def test_importing_media_is_light():
    code = "import sys, ditkit.media; print([m for m in ('torch', 'av', 'PIL', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "[]"
