"""The needle task: its videos, questions and splits, and that what ships was made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
from transformers import AutoTokenizer

from bench.needle import make_assets, show
from fftriton.needle import HARDER_SPLITS, KINDS, SPLITS, generate_sample
from fftriton.needle.digits import PATCH, digit_images
from fftriton.needle.needles import Appearance, Needle, blended, brief, covered, draw_needles, faded_in, moved, small
from fftriton.needle.relations import draw_in_turn
from fftriton.needle.samples import HARDER_KINDS, HARDER_RECIPES, RECIPES, ask, draw_video
from fftriton.needle.scenes import SIDE
from fftriton.needle.task import NeedleTask
from fftriton.needle.vocabulary import HARDER_IDS, HARDER_TOKENS, IDS, TOKENS, UNKNOWN, VIDEO, VISION_START
from fftriton.runtime.processing import load_processor
from fftriton.runtime.shipped import MODEL, NEEDLE
from fftriton.runtime.video import read_video

pytest.importorskip("av")  # reads videos

STYLES = (covered, blended, faded_in, moved)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def box(start: int, corners: tuple[tuple[int, int], ...], opacity: tuple[float, ...], digit=1, colour="blue") -> Needle:
    return Needle(digit, colour, Appearance(start, corners, opacity))


def test_a_sample_is_the_same_in_any_order_and_process():
    wanted = [(split, index) for split in SPLITS for index in (0, 7)]
    here = [generate_sample(split, 5, index, num_frames=8) for split, index in wanted]
    code = f"""
import torch
from zlib import crc32
from fftriton.needle import generate_sample
torch.set_num_threads(2)  # here there is one
for split, index in {wanted[::-1]}:
    sample = generate_sample(split, 5, index, num_frames=8)
    print(crc32(sample.frames), sample.question, sample.answer)
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert there[::-1] == [f"{crc32(sample.frames)} {sample.question} {sample.answer}" for sample in here]


def test_seed_index_split_and_held_out_each_change_the_video():
    arguments = [
        ("easy", 0, 0, True),
        ("easy", 1, 0, True),
        ("easy", 0, 5, True),
        ("easy", 0, 0, False),
        ("real", 0, 0),
    ]
    assert len({generate_sample(*a).frames.tobytes() for a in arguments}) == len(arguments)


def test_held_out_digits_are_every_fourth_and_training_has_none_of_them():
    train, _ = digit_images(held_out=False)
    test, labels = digit_images(held_out=True)
    assert (len(train), len(test)) == (1347, 450)
    assert set(labels.tolist()) == set(range(10))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


@pytest.mark.parametrize("held_out", [False, True])
def test_a_sample_shows_digits_of_its_own_half(held_out, monkeypatch):
    asked = []
    monkeypatch.setattr("fftriton.needle.digits.digit_images", lambda half: asked.append(half) or digit_images(half))
    generate_sample("easy", 0, 0, held_out=held_out)
    assert asked
    assert set(asked) == {held_out}


def test_without_scikit_learn_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digit_images.cache_clear()
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        generate_sample("easy", 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simple", 0, 0), "split must be one of easy, hard, blended, real, long, relations, .*, got 'simple'"),
        (("easy", -1, 0), "seed must be at least 0, got -1"),
        (("easy", 0, -1), "index must be at least 0, got -1"),
        (("easy", 0, 0, True, 2), "num_frames must be at least 4, got 2"),
        (("easy", 0, 0, True, 18), "num_frames must be a multiple of 4, got 18"),
        (("small", 0, 0, True, 12), "num_frames must be a multiple of 8, got 12"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_sample(*arguments)


@pytest.mark.parametrize(
    ("start", "corners", "opacity"),
    [
        (0, ((16, 32),), (1.0,)),
        (5, ((16, 32), (16, 32)), (1.0, 1.0)),
        (12, ((0, 32), (5, 32), (11, 32), (16, 32)), (1.0, 1.0, 1.0, 1.0)),
        (15, ((48, 48),), (0.5,)),
    ],
)
def test_a_needle_is_where_it_says_and_nowhere_else(start, corners, opacity):
    needle = box(start, corners, opacity)
    bare = draw_video(RECIPES["easy"], 16, [], True, rng()).astype(int)
    changed = (
        np.abs(draw_video(RECIPES["easy"], 16, [needle], True, rng()) - bare).max(-1) > 60
    )  # [F, H, W]; over noise
    for frame in range(16):
        rows, columns = changed[frame].nonzero()
        if frame not in needle.appearance.frames:
            assert len(rows) == 0
            continue
        top, left = corners[frame - start]
        assert top <= rows.min() <= rows.max() < top + PATCH
        assert left <= columns.min() <= columns.max() < left + PATCH


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
@pytest.mark.parametrize("num_frames", [4, 16, 64])
def test_needles_stay_in_their_quarter_and_quadrant(style, num_frames):
    for seed in range(50):
        needles = draw_needles(4, (style,), num_frames, rng(seed))
        quadrants = []
        for needle in needles:
            frames, corners = needle.appearance.frames, np.array(needle.appearance.corners)
            assert frames[0] * 4 // num_frames == frames[-1] * 4 // num_frames < 4
            assert (corners % (SIDE // 2) <= PATCH).all()
            (quadrant,) = {(row, column) for row, column in (corners // (SIDE // 2)).tolist()}
            quadrants.append(quadrant)
        assert len(set(quadrants)) == len({n.colour for n in needles}) == len({n.digit for n in needles}) == 4


def test_questions_and_answers():
    needles = [box(3, ((32, 16),), (1.0,), 4, "green"), box(9, ((0, 0),), (1.0,), 8, "red")]
    assert [ask(kind, needles, 16) for kind in KINDS] == [
        ("Which digit is on the green box?", "4"),
        ("When does the green box appear?", "first quarter"),
        ("Where is the green box?", "bottom left"),
        ("How many boxes appear?", "two"),
        ("Which colour is the box with the digit 4?", "green"),
    ]


def test_kinds_and_lengths_take_turns():
    samples = [generate_sample("long", 0, index) for index in range(20)]
    assert [sample.kind for sample in samples] == list(KINDS) * 4
    assert [len(sample.frames) for sample in samples] == [32] * 5 + [64] * 5 + [32] * 5 + [64] * 5
    assert [len(generate_sample("long", 0, index, num_frames=8).frames) for index in (0, 5)] == [8, 8]


def test_a_samples_needle_frames_and_depth():
    for index in range(25):
        sample = generate_sample("easy", 1, index)
        frames = sample.needle_frames
        assert frames
        assert all(0 <= frame < 16 for frame in frames)
        if sample.kind == "how many":
            assert sample.needle_depth is None
            continue
        assert sample.needle_depth == pytest.approx((frames[0] + frames[-1]) / 30)
        if sample.kind == "when":
            quarter = ("first quarter", "second quarter", "third quarter", "last quarter")[frames[0] // 4]
            assert sample.answer == quarter


def test_the_tokenizer_knows_every_question_and_answer_by_its_own_token():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for split in SPLITS:
        for index in range(30):
            sample = generate_sample(split, 2, index, num_frames=4)
            question = tokenizer(sample.question)["input_ids"]
            assert len(question) == 2
            assert IDS[UNKNOWN] not in question
            assert tokenizer.decode([IDS[sample.answer]]) == sample.answer


def test_blended_needles_resemble_what_they_cover_and_easy_ones_do_not():
    easy, blend = (show.onset_similarities(split, 60) for split in ("easy", "blended"))
    assert np.median(easy) < 0.3
    assert np.median(blend) > np.median(easy) + 0.2
    assert (blend > 0.6).mean() > 2 * (easy > 0.6).mean() + 0.1


def test_hard_videos_change_more_from_frame_to_frame():
    assert show.share_unchanged("hard", 20) < show.share_unchanged("easy", 20) - 0.2


def test_similarity_is_the_cosine_of_centred_pixels():
    grey = np.array([0.48145466, 0.4578275, 0.40821073]) * 255  # the processor's own
    patch = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3))
    found = show.similarity(patch[:2], np.stack([patch[0], 2 * grey - patch[1]]))
    np.testing.assert_allclose(found, [1, -1])


def test_show_draws_and_measures_every_split(tmp_path):
    show.main(tmp_path, count=1)
    rows = (tmp_path / "needle-splits.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["split", *SPLITS]
    assert (tmp_path / "needle-splits.jpg").stat().st_size > 10_000


def test_real_backgrounds_come_from_the_clips_given(tmp_path):
    grey = generate_sample("easy", 0, 0)
    path = tmp_path / "clip.mp4"
    object.__setattr__(grey, "frames", np.full((4, 64, 64, 3), 128, np.uint8))
    grey.write(path)
    sample = generate_sample("real", 0, 0, clips=(path,))
    bare = np.abs(sample.frames.astype(int) - 128).max(-1) < 40
    assert 0.9 < bare.mean() < 1  # all but needles and flashes
    assert (np.abs(generate_sample("real", 0, 0).frames.astype(int) - 128).max(-1) < 40).mean() < 0.5


def test_a_written_sample_reads_back(tmp_path):
    sample = generate_sample("easy", 0, 0)
    sample.write(tmp_path / "sample.mp4")
    video = read_video(tmp_path / "sample.mp4", len(sample.frames))
    assert video.sampled_fps == sample.fps
    small = video.frames.reshape(16, SIDE, 4, SIDE, 4, 3).mean((2, 4))
    assert np.abs(small - sample.frames).mean() < 4  # of 255: the encoder's loss


def test_shipped_processor_is_what_the_script_makes(tmp_path):
    make_assets.write_processor(tmp_path)
    for made in tmp_path.iterdir():
        assert made.read_text() == (MODEL / made.name).read_text(), made.name


def test_shipped_clip_is_what_the_script_makes():
    drawn = make_assets.needle_frames()
    shipped = read_video(NEEDLE.path, len(drawn)).frames.reshape(16, SIDE, 4, SIDE, 4, 3).mean((2, 4))
    assert np.abs(shipped - drawn).mean() < 4  # of 255: the encoder's loss
    assert make_assets.NEEDLE.digit == int(NEEDLE.answer)


def test_vocabulary_fits_the_model():
    config = json.loads((MODEL / "config.json").read_text())
    assert len(IDS) <= config["text_config"]["vocab_size"]
    named = {"video_token_id": VIDEO, "vision_start_token_id": VISION_START}
    assert {name: IDS[token] for name, token in named.items()} == {name: config[name] for name in named}


@pytest.mark.parametrize(
    ("split", "texts", "brightness"),
    [
        ("easy", 3347040813, [125.44, 118.36, 121.72, 127.29, 129.36, 119.13]),
        ("hard", 119091273, [115.83, 139.0, 130.97, 134.89, 145.52, 129.92]),
        ("blended", 2535956670, [112.07, 129.97, 136.03, 120.97, 137.27, 134.81]),
        ("real", 964743599, [94.0, 109.35, 102.56, 107.6, 90.32, 116.01]),
        ("long", 225690105, [143.34, 119.98, 116.47, 143.43, 116.98, 122.69]),
    ],
)
def test_samples_are_those_that_the_published_figures_were_measured_on(split, texts, brightness):
    samples = [generate_sample(split, 11, index, held_out=bool(index % 2), num_frames=8) for index in range(6)]
    found = 0
    for sample in samples:
        text = f"{sample.kind} {sample.question} {sample.answer} {sample.needle_frames} {sample.needle_depth}"
        found = crc32(text.encode(), found)
    assert found == texts
    np.testing.assert_allclose([sample.frames.mean() for sample in samples], brightness, atol=0.05)


def test_needles_in_turn_share_no_frame_and_the_first_is_followed():
    for seed in range(50):
        same = bool(seed % 2)
        needles = draw_in_turn(2 + seed % 3, (covered, small, brief), 16, same, rng(seed))
        frames = [frame for needle in needles for frame in needle.appearance.frames]
        assert len(frames) == len(set(frames))
        assert (needles[0].digit == needles[1].digit) == same
        assert len({needle.digit for needle in needles}) == len(needles) - same
        assert len({needle.colour for needle in needles}) == len(needles)
        assert needles[0].appearance.start < max(needle.appearance.start for needle in needles)


def test_questions_about_relations():
    needles = [
        box(6, ((0, 0),), (1.0,), 4, "green"),
        box(12, ((0, 32),), (1.0,), 4, "red"),
        box(9, ((32, 0),), (1.0,), 8, "blue"),
        box(2, ((32, 32),), (1.0,), 1, "yellow"),
    ]
    assert ask("after", needles, 16) == ("Which digit came after the one on the green box?", "8")
    assert ask("same", needles, 16) == ("Did the green and the red box show the same digit?", "yes")
    assert ask("same", needles[1:], 16) == ("Did the red and the blue box show the same digit?", "no")


def test_the_harder_splits_are_harder_in_the_way_they_say():
    for split in HARDER_SPLITS:
        samples = [generate_sample(split, 3, index, num_frames=16) for index in range(8)]
        assert [sample.kind for sample in samples] == list(HARDER_KINDS) * 2
        assert [sample.needle_depth is None for sample in samples] == [False, False, True, True] * 2
    assert [len(generate_sample("longer", 0, index).frames) for index in (0, 3, 4)] == [64, 64, 128]
    for seed in range(20):
        appearance = small(range(4, 8), 3, rng(seed))
        assert appearance.side == PATCH // 2
        assert all(32 <= edge <= SIDE - PATCH // 2 and edge % (PATCH // 2) == 0 for edge in appearance.corners[0])
        assert len(brief(range(4, 8), 0, rng(seed)).frames) == 1
    needle = Needle(3, "red", Appearance(5, ((8, 24),), (1.0,), PATCH // 2))
    bare, drawn = (draw_video(HARDER_RECIPES["small"], 16, shown, True, rng()).astype(int) for shown in ([], [needle]))
    frames, rows, columns, _ = (np.abs(drawn - bare) > 60).nonzero()
    assert (set(frames), min(rows), max(rows), min(columns), max(columns)) == ({5}, 8, 15, 24, 31)


def test_real_footage_moves_in_the_moving_split():
    still, moving = (
        draw_video(recipe, 16, [], True, rng(4)).astype(float)
        for recipe in (replace(HARDER_RECIPES["moving"], pans=False), HARDER_RECIPES["moving"])
    )
    steps = [np.median(np.abs(np.diff(video, axis=0))) for video in (still, moving)]
    assert steps[1] > 1.3 * steps[0]


def test_the_tokenizer_of_the_harder_splits_keeps_the_tokens_of_the_first():
    assert HARDER_TOKENS[: len(TOKENS)] == TOKENS
    plain, harder = make_assets.make_tokenizer(), make_assets.make_tokenizer(HARDER_IDS)
    for split in SPLITS:
        question = generate_sample(split, 2, 3, num_frames=8).question
        assert harder.encode(question).ids == plain.encode(question).ids
    texts = {
        "Which digit came after the one on the blue box?": ["after", "blue"],
        "What number appears after the yellow box?": ["after", "yellow"],
        "Did the red and the green box show the same digit?": ["red", "green", "same"],
    }
    assert {text: harder.encode(text).tokens for text in texts} == texts


def test_a_model_without_the_words_of_a_split_is_not_asked():
    task = NeedleTask("relations")
    processor = load_processor(MODEL)
    assert task.kinds == HARDER_KINDS
    with pytest.raises(ValueError, match="split must be one whose questions the model knows; 'relations' has words"):
        task.inputs(generate_sample("relations", 0, 2), processor)
    with pytest.raises(ValueError, match="frames must be multiples of 8, got 12"):
        NeedleTask("relations", num_frames=(12,))
