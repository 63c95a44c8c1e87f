"""Video files whose every frame has its own number drawn into it, in many containers and codecs."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10
BLOCK = 16  # pixels along the side of the square that shows a bit
ROWS = 4  # the bits stand in two rows; two more tell which way is up
WIDTH, HEIGHT = BLOCK * BITS // 2, BLOCK * ROWS

TURNS = {  # name: a, b, c, d of the display matrix, as x' = a x + c y, y' = b x + d y, and its inverse on an image
    "none": None,
    "90": ((0, 1, -1, 0), lambda image: np.rot90(image, 1)),
    "180": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "270": ((0, -1, 1, 0), lambda image: np.rot90(image, 3)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    "transversed": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
}


@dataclass(frozen=True)
class Recipe:
    """How a file is made.

    Attributes:
        suffix: of the container: mp4, mov, mkv, webm, avi, ts, mpg, flv, ...
        codec: name of FFmpeg's encoder.
        frames: how many.
        gop: frames from one key frame to the next, at most.
        b_frames: B-frames in a row.
        rate: frames per second.
        start: seconds at which the first frame is shown.
        turn: a name of TURNS; mp4 and mov only.
        gaps: how long each frame stays, in periods of the rate, in turn; (1,) is a constant rate.
        pixels: the pixel format.
        sound: whether an audio track goes along.
        options: of the encoder; container: of the muxer.
    """

    suffix: str = "mp4"
    codec: str = "libx264"
    frames: int = 60
    gop: int = 12
    b_frames: int = 2
    rate: Fraction = Fraction(25)
    start: float = 0.0
    turn: str = "none"
    gaps: Sequence[int] = (1,)
    pixels: str = "yuv420p"
    sound: bool = False
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)

    @property
    def times(self) -> list[float]:
        """When each frame is shown, in seconds after the first."""
        return [float(tick / self.rate) for tick in self._ticks()]

    def _ticks(self) -> list[int]:
        ticks, now = [], 0
        for number in range(self.frames):
            ticks.append(now)
            now += self.gaps[number % len(self.gaps)]
        return ticks

    def write(self, path: Path) -> Path:
        """Write the file."""
        turn = TURNS[self.turn]
        with av.open(str(path), "w", options=self.container) as out:
            stream = out.add_stream(self.codec, rate=self.rate, options=self._options())
            first = draw(0) if turn is None else turn[1](draw(0))
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = self.pixels
            stream.codec_context.gop_size = self.gop
            stream.codec_context.max_b_frames = self.b_frames
            stream.codec_context.time_base = 1 / self.rate
            sound = (
                out.add_stream("aac" if self.suffix in ("mp4", "mov", "flv") else "mp2", rate=44100)
                if self.sound
                else None
            )
            offset = round(self.start * self.rate)
            for number, tick in enumerate(self._ticks()):
                image = draw(number) if turn is None else np.ascontiguousarray(turn[1](draw(number)))
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = tick + offset, 1 / self.rate
                out.mux(stream.encode(frame))
                if sound is not None:
                    out.mux(_sound(sound, number, self.rate, self.start))
            out.mux(stream.encode())
            if sound is not None:
                out.mux(sound.encode())
        if turn is not None:
            _set_matrix(path, turn[0])
        return path

    def _options(self) -> dict[str, str]:
        quick = {
            "libx264": {"preset": "ultrafast", "threads": "1", "bf": str(self.b_frames)},
            "libx265": {
                "preset": "ultrafast",
                "x265-params": f"log-level=none:pools=1:frame-threads=1:bframes={self.b_frames}:"
                f"keyint={self.gop}:min-keyint=1",
            },
            "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "500k"},
            "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "500k"},
            "mpeg2video": {"b": "2M"},
            "mpeg4": {"b": "2M"},
        }
        return quick.get(self.codec, {}) | self.options


ENCODERS = {  # container: encoders that its files are made with
    "mp4": ["libx264", "libx265", "libvpx-vp9", "mpeg4", "mpeg2video"],
    "mov": ["libx264", "libx265", "mpeg4", "mpeg2video"],
    "mkv": ["libx264", "libx265", "libvpx-vp9", "libvpx", "mpeg4", "mpeg2video"],
    "webm": ["libvpx-vp9", "libvpx"],
    "avi": ["libx264", "mpeg4", "mpeg2video", "libvpx-vp9"],
    "ts": ["libx264", "libx265", "mpeg2video", "mpeg4"],
    "mpg": ["mpeg2video", "libx264", "mpeg1video"],
    "flv": ["libx264", "libx265", "flv"],
}
_RATES = [Fraction(rate) for rate in ("25", "24", "30", "30000/1001", "24000/1001", "50", "60", "12", "10")]
_WITHOUT_B_FRAMES = ("libvpx", "libvpx-vp9", "flv")


def random_recipe(seed: int) -> Recipe:
    """A recipe with everything drawn, of each container in turn."""
    rng = random.Random(seed)
    suffix = list(ENCODERS)[seed % len(ENCODERS)]
    codec = rng.choice(ENCODERS[suffix])
    rate = rng.choice(_RATES)
    can_vary = suffix not in ("avi", "mpg")
    recipe = Recipe(
        suffix,
        codec,
        frames=rng.choice([1, 2, 30, 61, 150, 260]),
        gop=rng.choice([1, 2, 5, 12, 25, 60, 250]),
        b_frames=0 if codec in _WITHOUT_B_FRAMES else rng.choice([0, 1, 2, 3]),
        rate=Fraction(25) if codec in ("mpeg1video", "mpeg2video") and rate < 20 else rate,
        start=rng.choice([0, 0, 0.5, 1.4, 7]),
        turn=rng.choice(list(TURNS)) if suffix in ("mp4", "mov") else "none",
        gaps=rng.choice([(1,), (1,), (1, 2), (1, 1, 1, 5), (1,) * 20 + (40,)]) if can_vary else (1,),
        sound=rng.random() < 0.3 and suffix != "webm",
    )
    if (suffix, codec) == ("flv", "libx265") and recipe.frames <= 2:
        return replace(recipe, b_frames=0)  # FFmpeg writes times that were never set
    return recipe


def draw(number: int) -> np.ndarray:
    """[HEIGHT, WIDTH, 3] uint8: the number's bits as white and black squares, above a red and beside a green bar."""
    image = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
    for bit in range(BITS):
        row, column = divmod(bit, BITS // 2)
        if number >> bit & 1:
            image[BLOCK * row : BLOCK * (row + 1), BLOCK * column : BLOCK * (column + 1)] = 235
    image[2 * BLOCK : 3 * BLOCK] = (200, 30, 30)
    image[3 * BLOCK :, : 2 * BLOCK] = (30, 160, 30)
    return image


def read_number(image: np.ndarray) -> int | None:
    """The number that is drawn into an image; None if the image lies on its side or shows something else."""
    if image.shape[:2] != (HEIGHT, WIDTH):
        return None
    squares = image.reshape(ROWS, BLOCK, WIDTH // BLOCK, BLOCK, 3).astype(float)[:, 4:12, :, 4:12].mean((1, 3))
    red, green, dark = squares[2], squares[3, :2], squares[3, 2:]
    upright = (
        (red[:, 0] > red[:, 1] + 60).all() and (green[:, 1] > green[:, 0] + 50).all() and (dark.mean(-1) < 90).all()
    )
    if not upright:
        return None
    return sum(int(level > 125) << bit for bit, level in enumerate(squares[:2].mean(-1).flatten()))


def _sound(stream, number, rate, start):
    count = int(44100 / rate)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * count), np.int16), format="s16", layout="stereo")
    frame.sample_rate = 44100
    frame.pts, frame.time_base = number * count + int(start * 44100), Fraction(1, 44100)
    return stream.encode(frame)


def _set_matrix(path: Path, turn: tuple[int, int, int, int]) -> None:
    """Write the display matrix into the header of the first track of an mp4 or mov."""
    one, (a, b, c, d) = 1 << 16, turn
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    before, mark, track = path.read_bytes().partition(b"tkhd")
    assert identity in track
    path.write_bytes(before + mark + track.replace(identity, matrix, 1))
