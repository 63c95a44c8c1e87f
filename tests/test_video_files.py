"""The frames that are asked for, number by number, from files of many kinds."""

from __future__ import annotations

import struct
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import TURNS, Recipe, draw, random_recipe, read_number

import fftriton.runtime.video
from fftriton.runtime.container import open_video
from fftriton.runtime.decoding import MismatchError, wanted_frames
from fftriton.runtime.sampling import PerSecond, sample_indices
from fftriton.runtime.timeline import scan
from fftriton.runtime.video import Video, read_video


def numbers(video: Video) -> list[int | None]:
    """What is drawn into the frames."""
    return [read_number(frame) for frame in video.frames]


def check(recipe: Recipe, path: Path, counts: tuple[int, ...] = (1, 3, 8, 1000)) -> None:
    """Every sampled frame is the one that its index names, and shown when its time says."""
    for count in counts:
        video = read_video(path, count)
        assert numbers(video) == video.indices, recipe
        assert len(video.indices) == min(count, recipe.frames)
        assert video.total_frames == recipe.frames
        if recipe.gaps == (1,) and not (recipe.suffix == "avi" and recipe.start):  # which stays long on its first frame
            assert video.indices == sample_indices(recipe.frames, count)
        if recipe.suffix not in ("avi", "mpg"):  # which do not hold the times
            expected = [recipe.times[index] for index in video.indices]
            assert np.allclose(video.times, expected, atol=0.002), recipe


@pytest.mark.parametrize("seed", range(24))
def test_random_files(tmp_path, seed):
    recipe = random_recipe(seed)
    check(recipe, recipe.write(tmp_path / f"video.{recipe.suffix}"), (1, 8))


@pytest.mark.night
@pytest.mark.parametrize("seed", range(24, 224))
def test_more_random_files(tmp_path, seed):
    recipe = random_recipe(seed)
    check(recipe, recipe.write(tmp_path / f"video.{recipe.suffix}"))


X264, ALT_REF = {"preset": "medium"}, {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
KINDS = {
    "frames before the key frame": Recipe("ts", gop=25, b_frames=3, options=X264 | {"x264-params": "open-gop=1"}),
    "no key frame but the first": Recipe("mkv", gop=25, options=X264 | {"x264-params": "intra-refresh=1"}),
    "references of references": Recipe("mp4", gop=25, b_frames=3, options=X264),
    "hidden frames": Recipe("webm", "libvpx", frames=120, gop=50, b_frames=0, options=ALT_REF),
    "hidden frames of vp9": Recipe("webm", "libvpx-vp9", frames=120, gop=50, b_frames=0, options=ALT_REF),
    "10 bit": Recipe("mp4", pixels="yuv420p10le"),
    "alpha": Recipe("mov", "prores_ks", frames=10, pixels="yuva444p10le"),
    "fragments": Recipe("mp4", start=7, container={"movflags": "frag_keyframe+empty_moov"}),
    "index first, with sound": Recipe("mp4", sound=True, container={"movflags": "faststart"}),
    "transport stream of one frame": Recipe("ts", frames=1),
    "transport stream of two frames": Recipe("ts", frames=2),
    "blu-ray": Recipe("m2ts", gop=30),
    "dvd": Recipe("vob", "mpeg2video", gop=15),
    "late mkv": Recipe("mkv", frames=100, start=7),
    "late webm": Recipe("webm", "libvpx-vp9", frames=50, start=100, b_frames=0),
    "bare h264": Recipe("h264"),
    "bare mpeg2": Recipe("m2v", "mpeg2video"),
    "windows media": Recipe("wmv", "wmv2", start=7, b_frames=0),
    "animated gif": Recipe("gif", "gif", frames=20, rate=Fraction(10), pixels="rgb8"),
    "motion jpeg": Recipe("avi", "mjpeg", pixels="yuvj420p", b_frames=0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files(tmp_path, kind):
    recipe = KINDS[kind]
    path = recipe.write(tmp_path / f"video.{recipe.suffix}")
    for count in (1, 5, 1000):
        video = read_video(path, count)
        assert numbers(video) == video.indices == sample_indices(recipe.frames, count)


@pytest.mark.parametrize("turn", TURNS)
def test_frames_come_upright(tmp_path, turn):
    check(replace(Recipe(frames=12), turn=turn), Recipe(frames=12, turn=turn).write(tmp_path / "turned.mp4"), (3,))


@pytest.fixture
def in_stretches(monkeypatch):
    """A file that is decoded as a whole fails the test."""
    monkeypatch.setattr(fftriton.runtime.video, "_decoded_timeline", lambda *_: pytest.fail("decoded it all"))


def test_only_the_stretches_before_the_wanted_frames_are_decoded(tmp_path, in_stretches):
    """Also for frames that are stored after the next key frame, as x265 does."""
    for suffix, codec in (("mp4", "libx264"), ("mkv", "libx265"), ("ts", "mpeg2video"), ("webm", "libvpx-vp9")):
        recipe = Recipe(suffix, codec, frames=100, b_frames=0 if codec == "libvpx-vp9" else 2)
        check(recipe, recipe.write(tmp_path / f"video.{suffix}"), (4, 33))


def test_timestamps_decide_where_the_rate_varies(tmp_path):
    """30 frames in the first second, then one per second: samples are spread over the time, not over the frames."""
    recipe = Recipe(frames=48, rate=Fraction(30), gaps=(1,) * 30 + (30,) * 18)
    video = read_video(recipe.write(tmp_path / "varying.mp4"), 8)
    assert numbers(video) == video.indices
    assert np.allclose(video.times, [recipe.times[index] for index in video.indices])
    assert np.diff(video.times).min() >= 1  # 19 seconds in 8 stretches of 2.4, to a frame's second
    assert video.times[0] >= 1
    assert np.isclose(video.sampled_fps, 8 / 19, rtol=0.06)


def test_a_frame_that_stays_is_taken_again(tmp_path):
    recipe = Recipe(frames=20, rate=Fraction(10), gaps=(1,) * 10 + (100,) + (1,) * 9)
    video = read_video(recipe.write(tmp_path / "still.mp4"), 6)
    assert numbers(video) == video.indices == [9, 10, 10, 10, 10, 10]


def test_frames_that_the_packets_only_seem_to_hold(tmp_path):
    path = Recipe(b_frames=0).write(tmp_path / "video.mp4")
    with open_video(path) as container:
        _, timeline = scan(container, path)
    stamps, ordinals = list(timeline.stamps), list(timeline.ordinals)
    stamps.insert(15, stamps[14] + 1)
    ordinals.insert(15, ordinals[14])
    wrong = replace(timeline, stamps=stamps, ordinals=ordinals, times=[*timeline.times, 60 / 25])
    for wanted in ([3, 20], [15]):
        with open_video(path) as container, pytest.raises(MismatchError):
            list(wanted_frames(container, wrong, wanted))


def test_hidden_frames_are_not_counted(tmp_path):
    """VP8 has frames that are only referred to: here, each key frame again."""
    source = Recipe("webm", "libvpx", b_frames=0).write(tmp_path / "source.webm")
    path = tmp_path / "video.webm"
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for packet in (packet for packet in container.demux(video=0) if packet.size):
            data = [(bytes(packet), packet.pts)]
            if packet.is_keyframe:
                data.append((bytes([data[0][0][0] & ~0x10]) + data[0][0][1:], packet.pts + 20))
            for content, stamp in data:
                copy = av.Packet(content)
                copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, stamp, stamp
                copy.is_keyframe = packet.is_keyframe and stamp == packet.pts
                out.mux(copy)
    for count in (3, 7, 60):
        video = read_video(path, count)
        assert numbers(video) == video.indices == sample_indices(60, count)
        assert video.total_frames == 60


def test_edit_lists(tmp_path, in_stretches):
    """Only frames 30 to 79 are shown; those before them are decoded, because they lead up to them."""
    path = Recipe(frames=120, gop=25).write(tmp_path / "edited.mp4")
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    _, first, rate = struct.unpack_from(">Iii", data, entry)
    struct.pack_into(">Iii", data, entry, 2000, first + 30 * 512, rate)  # in units of 1 ms and of 1/12800 s
    path.write_bytes(data)
    video = read_video(path, 5)
    assert video.total_frames == 50
    assert numbers(video) == [30 + index for index in video.indices] == [35, 45, 55, 65, 75]


def test_a_part_of_a_video(tmp_path):
    path = Recipe(frames=250).write(tmp_path / "video.mp4")
    video = read_video(path, 4, start=2, end=6)
    assert numbers(video) == video.indices == [62, 87, 112, 137]
    assert list(video.times) == [index / 25 for index in video.indices]
    assert video.sampled_fps == 1
    assert numbers(read_video(path, 1000, start=9.9)) == [247, 248, 249]
    assert numbers(read_video(path, rule=PerSecond(2), end=2)) == [0, 12, 25, 37]
    with pytest.raises(ValueError, match=r"start must be before the end of '.*video.mp4' at 10.00 s, got 10"):
        read_video(path, 4, start=10)


def test_transport_streams_that_were_cut_or_joined(tmp_path):
    data = Recipe("ts", frames=200, gop=25).write(tmp_path / "whole.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[188 * (len(data) // 188 // 3) :])  # in the middle of a group of pictures
    video = read_video(tmp_path / "cut.ts", 5)
    first = numbers(video)[0] - video.indices[0]
    assert first % 25 == 0
    assert numbers(video) == [first + index for index in video.indices]
    (tmp_path / "joined.ts").write_bytes(2 * data)
    with pytest.warns(UserWarning, match="has a fault or a splice at"):
        video = read_video(tmp_path / "joined.ts", 8)
    assert video.total_frames == 400
    assert numbers(video) == [index % 200 for index in video.indices]


def write_two_streams(path: Path) -> Path:
    """A picture, then a video."""
    with av.open(str(path), "w") as out:
        still, video = out.add_stream("mjpeg", rate=1), out.add_stream("libx264", rate=25)
        for stream, pixels in ((still, "yuvj420p"), (video, "yuv420p")):
            stream.height, stream.width = draw(0).shape[:2]
            stream.pix_fmt = pixels
        out.mux(still.encode(av.VideoFrame.from_ndarray(draw(900), format="rgb24")))
        out.mux(still.encode())
        for number in range(50):
            out.mux(video.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        out.mux(video.encode())
    return path


def test_a_picture_beside_a_video_is_not_the_video(tmp_path):
    video = read_video(write_two_streams(tmp_path / "two.mkv"), 5)
    assert numbers(video) == video.indices == sample_indices(50, 5)


def write_cover(path: Path, codec: str, picture: str) -> Path:
    """A second of silence with a picture."""
    with av.open(str(path), "w") as out:
        sound, cover = out.add_stream(codec, rate=44100), out.add_stream(picture, rate=1)
        cover.height, cover.width = draw(0).shape[:2]
        cover.pix_fmt = "rgb24" if picture == "png" else "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(draw(5), format="rgb24")))
        out.mux(cover.encode())
        for block in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, 1152 * block
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return path


@pytest.mark.parametrize(("name", "codec", "picture"), [("a.mp3", "libmp3lame", "png"), ("a.mkv", "aac", "mjpeg")])
def test_music_with_a_cover_is_refused(tmp_path, name, codec, picture):
    with pytest.raises(ValueError, match=f"'.*{name}', whose only picture is a cover or a still"):
        read_video(write_cover(tmp_path / name, codec, picture), 4)


def test_pictures_are_refused(tmp_path):
    for suffix, codec, pixels, rule in (
        ("png", "png", "rgb24", "is a still picture"),
        ("jpg", "mjpeg", "yuvj420p", "is a still picture"),
        ("webp", "libwebp_anim", "bgra", "a WebP: convert animated ones to mp4"),
    ):
        path = Recipe(suffix, codec, frames=1, pixels=pixels, b_frames=0).write(tmp_path / f"picture.{suffix}")
        with pytest.raises(ValueError, match=rule):
            read_video(path, 4)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "flv"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_files_that_are_cut_off_are_refused(tmp_path, suffix, share):
    recipe = Recipe(suffix, "libvpx-vp9" if suffix == "webm" else "libx264", frames=200, b_frames=0)
    path = recipe.write(tmp_path / f"video.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="video must be whole, .* cut off"):
        read_video(path, 1)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_files_that_are_cut_off_between_two_frames_are_refused(tmp_path, suffix):
    path = Recipe(suffix, frames=200, b_frames=0, container={"movflags": "faststart"}).write(tmp_path / f"v.{suffix}")
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: positions[190] - (8 if suffix == "avi" else 0)])
    with pytest.raises(ValueError, match=r"video must be whole, .* cut off: it holds \d+ of \d+ bytes"):
        read_video(path, 1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
def test_pictures_that_are_painted_over_are_refused(tmp_path, suffix):
    """FFmpeg would show the damaged frame with what it makes up."""
    path = Recipe(suffix, frames=60, gop=60, container={}).write(tmp_path / f"video.{suffix}")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
    data[packet.pos + packet.size // 2 : packet.pos + packet.size] = bytes(packet.size - packet.size // 2)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_video(path, 3)


def test_whole_files_bring_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("ts", "mp4"):
            read_video(Recipe(suffix).write(tmp_path / f"video.{suffix}"), 4)


@pytest.mark.parametrize("arguments", [(), (4, None, PerSecond(2))])
def test_a_number_of_frames_or_a_rule(tmp_path, arguments):
    count, _, rule = arguments or (None, None, None)
    with pytest.raises(TypeError, match="must get num_frames or rule"):
        read_video(tmp_path / "video.mp4", count, rule=rule)
