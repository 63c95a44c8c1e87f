"""Sampling frames from video files: the right frames, and a clear refusal of every bad file."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fftriton.runtime.video import read_video, sample_indices

av = pytest.importorskip("av")

NUM_FRAMES = 60


def numbered_frames(count: int) -> np.ndarray:
    """[count, 32, 48, 3]: frame i has brightness 16 + 3 * i, but for its left half, which is black."""
    levels = (16 + 3 * np.arange(count)).astype(np.uint8)
    frames = np.repeat(levels, 32 * 48 * 3).reshape(count, 32, 48, 3)
    frames[:, :, :24] = 0
    return frames


def write_video(path: Path, frames: np.ndarray, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0", "g": "8", "bf": "2", "threads": "1"})
        stream.pix_fmt = "yuv444p"
        stream.height, stream.width = frames.shape[1:3]
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Which of `numbered_frames` these are, from their brightness."""
    return [round((float(frame[:, 30:].mean()) - 16) / 3) for frame in frames]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    return write_video(path, numbered_frames(NUM_FRAMES), movflags="faststart")


@given(total=st.integers(1, 500), count=st.integers(1, 600))
def test_indices_are_spread_evenly(total, count):
    indices = sample_indices(total, count)
    assert len(indices) == min(total, count)
    assert indices[0] >= 0
    assert indices[-1] < total
    gaps = np.diff(indices)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_indices_take_the_middle_of_each_stretch():
    assert sample_indices(64, 4) == [8, 24, 40, 56]
    assert sample_indices(10, 1) == [5]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 59, 60])
def test_sampled_frames_are_the_ones_named(numbered, count):
    video = read_video(numbered, count)
    assert video.frames.shape == (count, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert numbers(video.frames) == video.indices == sample_indices(NUM_FRAMES, count)
    assert video.total_frames == NUM_FRAMES
    assert video.fps == 25


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".ts", ".h264"])
def test_other_containers(tmp_path, suffix):
    """.h264 is a bare stream: no timestamps to seek by."""
    video = read_video(write_video(tmp_path / f"video{suffix}", numbered_frames(NUM_FRAMES)), 5)
    assert numbers(video.frames) == video.indices


def test_video_of_one_frame(tmp_path):
    video = read_video(write_video(tmp_path / "one.mp4", numbered_frames(1)), 16)
    assert (video.frames.shape, video.indices, video.total_frames) == ((1, 32, 48, 3), [0], 1)


def test_short_video_gives_all_its_frames(tmp_path):
    video = read_video(write_video(tmp_path / "short.mp4", numbered_frames(3)), 16)
    assert numbers(video.frames) == video.indices == [0, 1, 2]


def test_rotated_video_comes_upright(tmp_path):
    """A phone held upright stores lying frames and a matrix: here, to be turned clockwise by 90 degrees."""
    path = write_video(tmp_path / "turned.mp4", numbered_frames(40))
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    before, _, track = path.read_bytes().partition(b"tkhd")
    path.write_bytes(before + b"tkhd" + track.replace(identity, clockwise, 1))
    frame = read_video(path, 1).frames[0]
    assert frame.shape == (48, 32, 3)
    assert frame[:20].mean() < 20 < frame[28:].mean()  # the black half was on the left, now it is at the top


def test_progress_counts_the_frames(numbered):
    calls = []
    read_video(numbered, 4, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_refuses_what_is_no_video(tmp_path):
    rules = {
        "missing.mp4": "must be a file that exists",
        "folder.mp4": "must be a file, got the folder",
        "empty.mp4": "must not be empty",
        "text.mp4": "must be a video file",
        "long.txt": "has no video stream",  # FFmpeg reads it as ANSI art
        "sound.wav": "has no video stream",
    }
    (tmp_path / "folder.mp4").mkdir()
    write_bytes(tmp_path / "empty.mp4", b"")
    write_bytes(tmp_path / "text.mp4", b"not a video\n")
    write_bytes(tmp_path / "long.txt", b"Not a video, but a long text.\n" * 400)
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 836, b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", 800)
    write_bytes(tmp_path / "sound.wav", header + bytes(800))
    for name, rule in rules.items():
        with pytest.raises(ValueError, match=f"^video .*{rule}.*") as error:
            read_video(tmp_path / name, 4)
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".mp4", {"movflags": "faststart"}), (".mp4", {}), (".mkv", {})],
    ids=["index first", "index last", "matroska"],
)
def test_refuses_a_file_cut_off_in_the_middle(tmp_path, suffix, options):
    whole = write_video(tmp_path / f"whole{suffix}", numbered_frames(NUM_FRAMES), **options)
    data = whole.read_bytes()
    for fraction in (0.5, 0.75):
        cut = write_bytes(tmp_path / f"cut{suffix}", data[: int(len(data) * fraction)])
        with pytest.raises(ValueError, match=r"video must be (whole|a video file)"):
            read_video(cut, 1)


def test_refuses_a_file_that_lacks_its_last_bytes(numbered, tmp_path):
    cut = write_bytes(tmp_path / "cut.mp4", numbered.read_bytes()[:-10])
    with pytest.raises(ValueError, match="video must be whole, .* which is cut off: it holds"):
        read_video(cut, 1)


IN_OPEN = 0x20  # of inotify(7)


@contextmanager
def unopened(*paths: Path) -> Iterator[None]:
    """Fail if any of these files is opened inside."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        for path in paths:
            assert libc.inotify_add_watch(watch, os.fsencode(path), IN_OPEN) >= 0, os.strerror(ctypes.get_errno())
        yield
        with pytest.raises(BlockingIOError):  # nothing to read: no event
            os.read(watch, 4096)
    finally:
        os.close(watch)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
LISTS = {  # file name: what stands in it, with a place for the name of another file
    "segments.m3u8": HLS,
    "variants.m3u8": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\n{}\n",
    "list.ffconcat": "ffconcat version 1.0\nfile {}\n",
    "list.mp4": "ffconcat version 1.0\nfile {}\n",  # the content tells, not the name
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet><Representation><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "list.asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "call.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns={}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 33\n",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("named", ["{path.name}", "{path}", "file://{path}", "subfile,,start,0,end,0,,:{path}"])
def test_a_list_of_other_files_is_refused_and_none_of_them_opened(tmp_path, name, named):
    for suffix in (".mp4", ".ts"):
        secret = write_video(tmp_path / f"secret{suffix}", numbered_frames(60))
        (tmp_path / name).write_text(LISTS[name].format(named.format(path=secret)))
        with unopened(secret), pytest.raises(ValueError, match="^video must be .* not a list of other files") as error:
            read_video(tmp_path / name, 4)
        assert name in str(error.value)


def test_a_playlist_of_variants_opens_no_other_playlist(tmp_path):
    secret = write_video(tmp_path / "secret.ts", numbered_frames(60))
    inner, outer = tmp_path / "segments.m3u8", tmp_path / "variants.m3u8"
    inner.write_text(HLS.format(secret.name))
    outer.write_text(LISTS["variants.m3u8"].format(inner.name))
    with unopened(inner, secret), pytest.raises(ValueError, match="not a list of other files"):
        read_video(outer, 4)


def test_subtitles_that_name_their_pictures_are_refused(tmp_path):
    """FFmpeg opens the .sub beside a VobSub index."""
    pictures = write_bytes(tmp_path / "text.sub", b"\0\0\1\xba" + bytes(3000))
    (tmp_path / "text.idx").write_text("# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n")
    with unopened(pictures), pytest.raises(ValueError, match="not a list of other files"):
        read_video(tmp_path / "text.idx", 4)


def test_a_name_like_a_pattern_is_that_of_one_file(tmp_path):
    """FFmpeg reads img%03d.png as img000.png, img001.png, ..."""
    names = ["img%03d.png", "img000.png", "img001.png"]
    for level, name in enumerate(names):
        image = np.full((32, 48, 3), 100 * level, np.uint8)
        av.VideoFrame.from_ndarray(image, format="rgb24").to_image().save(tmp_path / name, format="png")
    with unopened(*(tmp_path / name for name in names[1:])), pytest.raises(ValueError, match="is a still picture"):
        read_video(tmp_path / names[0], 4)
    (tmp_path / names[0]).unlink()
    with pytest.raises(ValueError, match="video must be a file that exists"):
        read_video(tmp_path / names[0], 4)


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_too_few_frames(numbered, count):
    with pytest.raises(ValueError, match=f"frames must be at least 1, got {count}"):
        read_video(numbered, count)
