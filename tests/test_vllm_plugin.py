"""What of the plugin needs no vLLM: positions, relevance of requests, methods that are refused, the command."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fftriton
from fftriton.methods import Method
from fftriton.methods.text import from_dict, parse, to_dict
from fftriton.runtime.shipped import MODEL
from fftriton.vllm import ARCHITECTURES, PREFIX, __main__, relevance
from fftriton.vllm.methods import method_of, refusal, shorten, try_out
from fftriton.vllm.positions import COLUMNS, Media, add_columns, all_places, check_gaps, fill_in, lay_out, places


class Config:
    def __init__(self, **fields):
        vars(self).update(fields)


def by_hand(length, media, kept):
    """Positions one token at a time. kept: the places in the grid that are left of each."""
    found, following, at = [], 0, 0

    def text(count):
        nonlocal following
        found.extend([(following + number,) * 3 for number in range(count)])
        following += count

    for one, places_left in zip(media, kept, strict=True):
        text(one.offset - at)
        t, h, w = one.grid
        if one.texts:
            for frame, count in enumerate(one.texts):
                text(count)
                if frame < t:
                    cells = [(following, following + j, following + k) for j in range(h) for k in range(w)]
                    found += [cells[place - frame * h * w] for place in places_left if place // (h * w) == frame]
                    following += max(h, w)
        else:
            cells = [(int(i * one.speed), j, k) for i in range(t) for j in range(h) for k in range(w)]
            found += [tuple(following + part for part in cells[place]) for place in places_left]
            following += 1 + max(map(max, cells))
        at = one.offset + one.length
    text(length - at)
    return found, following - length


@st.composite
def prompts(draw):
    media, kept, at = [], [], 0
    for _ in range(draw(st.integers(1, 3))):
        grid = tuple(draw(st.integers(1, most)) for most in (9, 4, 5))
        total = grid[0] * grid[1] * grid[2]
        count = draw(st.integers(1, total))
        left = sorted(draw(st.permutations(range(total)))[:count])
        texts = tuple(draw(st.integers(1, 4)) for _ in range(grid[0] + 1)) if draw(st.booleans()) else ()
        at += draw(st.integers(1, 4))
        speed = draw(st.sampled_from([1.0, 2.0, 0.5, 3.25, 300.0]))
        media.append(Media(at, count + sum(texts), grid, speed, texts))
        kept.append(left)
        at += media[-1].length
    return at + draw(st.integers(0, 4)), media, kept


IMAGE, VIDEO, WORD = 7, 8, 1


@given(prompts(), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_positions_come_out_whole_whatever_the_chunks(prompt, chunk, dtype):
    length, media, kept = prompt
    expected, delta = by_hand(length, media, kept)
    positions, found_delta = lay_out(length, media)
    ids, rows = torch.full((length,), WORD), torch.zeros(length, 4 + COLUMNS, dtype=dtype)
    for one, left in zip(media, kept, strict=True):
        anchor = one.texts[0] if one.texts else 0
        ids[one.offset + anchor : one.offset + anchor + len(left)] = VIDEO  # as if all were of the first frame
        place = (all_places if one.texts else places)(torch.tensor(left), one)
        hidden = torch.randn(one.length, 4).to(dtype)
        rows[one.offset : one.offset + one.length] = add_columns(hidden, place, anchor)
    for again in range(2):
        for first in range(0, length, chunk):
            window = range(first, min(first + chunk, length))
            parts = [(max(one.offset, first), min(one.offset + one.length, window.stop)) for one in media]
            embeddings = [rows[low:high] for low, high in parts if low < high]
            cleaned, positions = fill_in(positions, ids, (IMAGE, VIDEO), embeddings, 4, first)
            for (low, high), out in zip([part for part in parts if part[0] < part[1]], cleaned, strict=True):
                assert torch.equal(out, rows[low:high, :4])
        assert positions.T.tolist() == [list(one) for one in expected], again
    assert found_delta == delta


def test_images_beside_videos():
    media = [Media(1, 4, (1, 2, 2)), Media(6, 3, (4, 2, 2)), Media(10, 6, (1, 2, 3))]
    expected, _ = by_hand(18, media, [range(4), [0, 5, 15], range(6)])
    positions, _ = lay_out(18, media)
    ids = torch.tensor([1, *[7] * 4, 1, *[8] * 3, 1, *[7] * 6, 1, 1])
    video = add_columns(torch.randn(3, 4), places(torch.tensor([0, 5, 15]), media[1]))
    _, positions = fill_in(positions, ids, (7, 8), [torch.randn(4, 4), video, torch.randn(6, 4)], 4, 0)
    assert positions.T.tolist() == [list(one) for one in expected]
    _, again = fill_in(positions, ids, (7, 8), [torch.randn(2, 4), video[:2]], 4, 3)  # a part, begun in the image
    assert torch.equal(again, positions)


def test_what_follows_a_video_does_not_wait_for_its_tokens():
    media = [Media(2, 5, (4, 2, 3))]
    positions, delta = lay_out(10, media)
    expected, whole_delta = by_hand(10, media, [[0, 1, 2, 3, 4]])
    assert positions[:, 7:].T.tolist() == [list(one) for one in expected[7:]]
    assert delta == whole_delta


def test_places_are_exact_in_bfloat16():
    index = torch.arange(0, 65536, 997)
    place = torch.stack([index, index.flip(0), index], 1)
    joined = add_columns(torch.zeros(len(index), 2, dtype=torch.bfloat16), place)
    ids = torch.tensor([1] + [8] * len(index))
    _, positions = fill_in(torch.zeros(3, len(ids), dtype=torch.long), ids, (7, 8), [joined], 2, 0)
    assert torch.equal(positions[:, 1:].T, place + 1)
    with pytest.raises(ValueError, match="positions in a video must be at most 65535, got 65536"):
        add_columns(torch.zeros(1, 2), torch.tensor([[65536, 0, 0]]))


def test_images_and_videos_must_not_touch():
    check_gaps([(1, 5), (7, 2)])
    with pytest.raises(ValueError, match="a token of text must stand before every image and video.*before token 6"):
        check_gaps([(1, 5), (6, 2)])
    with pytest.raises(ValueError, match="before token 0"):
        check_gaps([(0, 5)])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("abc", "must be a list of numbers for each video, got 'abc'"),
        ([1.0, 2.0], "must be a list of numbers for each video"),
        ({"a": 1}, "must be a list of numbers for each video"),
        ([["1"]], "must hold numbers"),
        ([[True]], "must hold numbers"),
        ([[float("nan")]], "must be finite, got nan"),
        ([[10**400]], "must be finite, got inf"),
        ([[-(10**400)]], "must be finite, got -inf"),
        ([[1.0], [2.0]], "must be a list for each video of the request, 1, got 2"),
        ([], "must be a list for each video of the request, 1, got 0"),
    ],
)
def test_relevance_that_is_wrong(given, error):
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        relevance.of_request({relevance.KEY: given}, 1)


def test_relevance_of_frames_of_tokens():
    written = relevance.for_request([torch.tensor([1.0, 4.0, 2.0]), np.array([1.0, 2.0])], [2, 2])
    assert json.loads(json.dumps(written)) == {relevance.KEY: [[4.0, 2.0], [1.0, 2.0]]}
    [first, second] = relevance.of_request(written, 2)
    assert (first.tolist(), second.tolist()) == ([4.0, 2.0], [1.0, 2.0])
    relevance.check_frames(first, 2)
    with pytest.raises(ValueError, match="one number for each frame of tokens, 3, got 2"):
        relevance.check_frames(first, 3)
    with pytest.raises(ValueError):
        relevance.for_request([torch.ones(7)], [2])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("framefusion", "FrameFusion cannot run inside vLLM.*use TemporalMerge"),
        ("fastv", "FastV cannot run inside vLLM.*use TemporalMerge"),
        ("streamingllm", "StreamingLLM cannot run inside vLLM.*use TemporalMerge"),
        ("temporalmerge + fastv:layer=2", "a chain of methods cannot run inside vLLM.*use TemporalMerge"),
        ("uniformframes + kvtp", "a chain of methods"),
        ("kvtp:relevance=attention", "relevance must come with each request"),
        ("kvtp:renumber=True", "renumber must be False"),
        ("temporalmerge:proportional=True", "proportional must be False"),
        ("kvtp:pruner=tome(proportional=True)", "proportional must be False"),
        ("anchors", "proportional must be False"),
        ("kvtp:pruner=topk(importance=predictor)", "must not want the predictor's patches"),
    ],
)
def test_methods_that_are_refused(text, reason):
    assert re.search(reason, refusal(parse(text, 0.3)))
    with pytest.raises(ValueError, match=reason):
        __main__.make_overrides("Qwen2VLForConditionalGeneration", text, 0.3)


@pytest.mark.parametrize("text", ["keep-all", "temporalmerge", "uniformframes", "randomtokens", "kvtp:pruner=tome"])
@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0])
def test_methods_that_can_run(text, budget):
    method = parse(text, budget)
    assert refusal(method) is None
    try_out(method)
    described = __main__.make_overrides("Qwen2VLForConditionalGeneration", text, budget)
    assert described["architectures"] == ["FFTritonQwen2VLForConditionalGeneration"]
    assert to_dict(method_of(Config(fftriton=json.loads(json.dumps(described["fftriton"]))))) == to_dict(method)
    hidden = torch.randn(5 * 6, 8)
    left, index = shorten(method, hidden, 5, 6)
    assert len(left) == len(index) == method.count(5, 6)
    assert bool((index.diff() > 0).all())


def test_relevance_decides_which_tokens_stay():
    method, hidden = parse("kvtp:temperature=0.1", 0.3), torch.randn(6 * 10, 8)
    _, index = shorten(method, hidden, 6, 10, torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 0.0]))
    assert torch.bincount(index // 10).tolist() == [2, 2, 2, 10, 1, 1]


class Miscounts(fftriton.UniformFrames):
    def count(self, frames, patches):
        return super().count(frames, patches) + (frames == 7)


def test_a_method_that_miscounts_is_refused_before_it_runs():
    with pytest.raises(ValueError, match=r"Miscounts.count must be the number of tokens that it leaves, 25 .*, got 26"):
        try_out(Miscounts(0.3))


class ThinsOut(Method):
    """A method of a user's own."""

    def count(self, frames, patches):
        return frames * -(-patches // 2)

    def begin(self, prompt):
        return fftriton.UniformFrames(0.5).begin(prompt)


def test_a_method_of_a_users_own():
    assert refusal(ThinsOut()) is None
    with pytest.raises(ValueError, match=r"ThinsOut.count must be"):
        try_out(ThinsOut())


@pytest.mark.parametrize("description", [None, "temporalmerge", 0.3, {"budget": 0.3}])
def test_a_configuration_without_a_method(description):
    fields = {} if description is None else {"fftriton": description}
    with pytest.raises(TypeError, match="fftriton: "):
        method_of(Config(**fields))


def test_the_command():
    out = CliRunner().invoke(__main__.app, [str(MODEL), "--method", "kvtp:pruner=tome", "--budget", "0.2"])
    assert out.exit_code == 0
    words = shlex.split(out.stdout)
    assert str(MODEL) in words
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    assert overrides["architectures"] == [PREFIX + "Qwen2VLForConditionalGeneration"]
    assert __main__.RELEVANCE_FLAG in words
    assert to_dict(from_dict(overrides["fftriton"])) == to_dict(parse("kvtp:pruner=tome", 0.2))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "MODEL must be given"),
        ([str(MODEL), "--method", "framefusion"], "use TemporalMerge"),
        ([str(MODEL), "--method", "nonsense"], "method must be one of"),
        ([str(MODEL), "--budget", "0"], "budget must be in (0, 1], got 0"),
        (["/nowhere"], "model must be"),
    ],
)
def test_the_command_refuses(arguments, error):
    out = CliRunner().invoke(__main__.app, arguments)
    assert out.exit_code == 2
    assert not out.stdout
    assert error in " ".join(out.stderr.split())


def test_another_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    out = CliRunner().invoke(__main__.app, [str(tmp_path)])
    assert out.exit_code == 2
    assert f"MODEL must be one of {', '.join(ARCHITECTURES)}, got Qwen2ForCausalLM" in " ".join(out.stderr.split())


def test_which_methods_can_run():
    out = CliRunner().invoke(__main__.app, ["--methods"])
    assert out.exit_code == 0
    rows = dict(re.findall(r"│ (\S+) +│ (yes|no) ", out.stdout))
    assert {"temporalmerge": "yes", "kvtp": "yes", "framefusion": "no", "fastv": "no"}.items() <= rows.items()


def test_registering_imports_no_torch():
    """vLLM calls it in every process."""
    code = (
        "import sys, types\n"
        "sys.modules['vllm'] = vllm = types.ModuleType('vllm')\n"
        "class ModelRegistry:\n"
        "    get_supported_archs = staticmethod(lambda: {'Qwen2VLForConditionalGeneration'})\n"
        "    register_model = staticmethod(lambda name, place: print(name, place))\n"
        "vllm.ModelRegistry = ModelRegistry\n"
        "import fftriton.vllm, fftriton.vllm.faults\n"
        "fftriton.vllm.faults.step_around = lambda: None\n"
        "fftriton.vllm.register()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["FFTritonQwen2VLForConditionalGeneration", "fftriton.vllm.qwen:Qwen2VL"]
