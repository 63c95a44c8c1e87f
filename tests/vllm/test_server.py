"""The server: many requests at once, wrong ones among them, what requests may ask for, and a missing plugin."""

import json
import random
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import NEEDLE
from video_files import Recipe

from bench.serving.server import chat, post, serving, text_of
from fftriton.needle.vocabulary import COLOURS
from fftriton.vllm.__main__ import RELEVANCE_FLAG, make_overrides
from fftriton.vllm.relevance import KEY

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
FRAMES = 16
EXACT = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
SAMPLING = (*EXACT, "--media-io-kwargs", json.dumps({"video": {"num_frames": FRAMES, "fps": 8}}))
QUESTIONS = [
    text.format(colour)
    for colour in COLOURS
    for text in (
        "Which digit is on the {} box?", "Where is the {} box?", "When does the {} box show?", "Is there a {} box?",
        "{} box",
    )
]  # fmt: skip
CLIPS = NEEDLE.parent / "clips"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    made = [folder / "first.mp4", folder / "second.mp4"]
    for path, frames in zip(made, (30, 47), strict=True):
        Recipe(frames=frames).write(path)
    return [CLIPS / "needle.mp4", CLIPS / "bunny.mp4", *made]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    overrides = make_overrides(ARCHITECTURE, "kvtp:temperature=0.5", 0.3)
    with serving(NEEDLE, overrides, log, *SAMPLING, RELEVANCE_FLAG) as address:
        yield address


@pytest.fixture(scope="module")
def lengths(server, videos):
    """How many frames of tokens the server takes from each video: its error says so."""
    found = {}
    for video in videos:
        _, answer = post(server, "/v1/chat/completions", chat([video], "box", mm_processor_kwargs={KEY: [[]]}))
        found[video] = int(re.search(r"frame of tokens, (\d+), got 0", json.dumps(answer))[1])
    return found


def scores(draw, frames):
    return {KEY: [[draw.uniform(-3, 3) for _ in range(frames)]]}


def wrong(draw, lengths):
    """A request that must get an error of its own, and a word of it."""
    question, video = draw.choice(QUESTIONS), draw.choice(list(lengths))
    frames = lengths[video]
    kind = draw.randrange(6)
    if kind == 0:
        return chat([video], question, mm_processor_kwargs={KEY: [[1.0] * (frames + 1)]}), "one number for each frame"
    if kind == 1:
        return chat([video], question, mm_processor_kwargs={KEY: [[1.0] * frames] * 2}), "a list for each video"
    if kind == 2:
        return chat([video], question, mm_processor_kwargs={KEY: "high"}), "a list of numbers"
    if kind == 3:
        return chat([video], question, mm_processor_kwargs={KEY: [["1"] * frames]}), "must hold numbers"
    if kind == 4:
        return chat([video], question, mm_processor_kwargs={KEY: [[1e999] * frames]}), ""  # no JSON
    broken = chat([video], question)
    broken["messages"][0]["content"][0]["video_url"]["url"] = "data:video/mp4;base64,AAAA"
    return broken, ""


def test_two_hundred_requests_at_once(server, lengths):
    draw = random.Random(0)
    requests = []
    for _ in range(200):
        if draw.random() < 0.2:
            requests.append(wrong(draw, lengths))
        else:
            video, own = draw.choice(list(lengths)), random.Random(draw.randrange(2))
            relevance = draw.choice([{}, {"mm_processor_kwargs": scores(own, lengths[video])}])
            requests.append((chat([video], draw.choice(QUESTIONS), **relevance), None))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: post(server, "/v1/chat/completions", request[0]), requests))
    alone = {}
    for (request, error), (status, answer) in zip(requests, answers, strict=True):
        if error is not None:
            assert 400 <= status < 600
            assert error in json.dumps(answer)
            continue
        assert status == 200, answer
        key = json.dumps(request)
        if key not in alone:
            alone[key] = post(server, "/v1/chat/completions", request)[1]
        assert text_of(answer) == text_of(alone[key])
        for mine, its in zip(*(one["choices"][0]["logprobs"]["content"] for one in (answer, alone[key])), strict=True):
            assert abs(mine["logprob"] - its["logprob"]) < 1e-3
    assert urllib.request.urlopen(server + "/health").status == 200
    assert len({text_of(answer) for answer in alone.values()}) > 5


def test_relevance_may_be_missing_and_means_nothing_without_a_video(server, videos):
    status, _ = post(server, "/v1/chat/completions", chat([], QUESTIONS[0], mm_processor_kwargs=scores(random, 3)))
    assert status == 200  # of text alone
    status, _ = post(server, "/v1/chat/completions", chat([videos[0]], QUESTIONS[0]))
    assert status == 200


def test_several_answers_streaming_and_structure(server, videos, lengths):
    request = chat([videos[0]], QUESTIONS[0], mm_processor_kwargs=scores(random.Random(1), lengths[videos[0]]))
    _, one = post(server, "/v1/chat/completions", request)
    drawn = request | {"n": 3, "temperature": 0.8, "seed": 5, "logprobs": False, "top_logprobs": None}
    _, many = post(server, "/v1/chat/completions", drawn)
    _, again = post(server, "/v1/chat/completions", drawn)
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in (many, again)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    body = json.dumps(request | {"stream": True, "logprobs": False, "top_logprobs": None}).encode()
    asked = urllib.request.Request(server + "/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as lines:
        parts = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == text_of(one)
    status, chosen = post(
        server,
        "/v1/chat/completions",
        request | {"structured_outputs": {"choice": ["3", "7"]}, "logprobs": False, "top_logprobs": None},
    )
    assert status == 200, chosen
    assert text_of(chosen).strip() in ("3", "7")


def test_requests_that_are_put_off(tmp_path, videos):
    """With few blocks, requests are stopped and begun anew."""
    overrides = make_overrides(ARCHITECTURE, "temporalmerge", 0.3)
    few = ("--num-gpu-blocks-override", "12", "--block-size", "32", "--max-num-seqs", "8", "--max-model-len", "352")
    with serving(NEEDLE, overrides, tmp_path / "log", *SAMPLING, *few) as server:
        requests = [
            chat([video], question, max_tokens=60, ignore_eos=True)
            for video, question in zip(videos * 2, QUESTIONS, strict=False)
        ]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda one: post(server, "/v1/chat/completions", one), requests))
        preempted = sum(
            float(line.rpartition(" ")[2])
            for line in urllib.request.urlopen(server + "/metrics").read().decode().splitlines()
            if line.startswith("vllm:num_preemptions_total")
        )
        assert preempted > 0
        for request, (status, answer) in zip(requests, together, strict=True):
            assert status == 200
            assert text_of(answer) == text_of(post(server, "/v1/chat/completions", request)[1])


def test_without_the_plugin_the_server_does_not_start(tmp_path):
    overrides = make_overrides(ARCHITECTURE, "temporalmerge", 0.3)
    with (
        pytest.raises(RuntimeError, match="FFTritonQwen2VLForConditionalGeneration"),
        serving(NEEDLE, overrides, tmp_path / "log", *EXACT, VLLM_PLUGINS="none"),
    ):
        pass


@pytest.mark.parametrize(
    ("description", "error"),
    [
        ({"method": "framefusion", "budget": 0.3}, "use TemporalMerge"),
        ({"method": "temporalmerge", "budget": 0}, "budget must be in"),
        (None, "--hf-overrides must hold 'fftriton'"),
    ],
)
def test_a_method_that_cannot_run_ends_the_start(tmp_path, description, error):
    overrides = {"architectures": [f"FFTriton{ARCHITECTURE}"]}
    overrides |= {} if description is None else {"fftriton": description}
    with pytest.raises(RuntimeError, match=error), serving(NEEDLE, overrides, tmp_path / "log", *EXACT):
        pass


def test_vllms_own_pruning_beside_ours(tmp_path):
    overrides = make_overrides(ARCHITECTURE, "temporalmerge", 0.3)
    with (
        pytest.raises(RuntimeError, match="--video-pruning-rate must not be given"),
        serving(NEEDLE, overrides, tmp_path / "log", *EXACT, "--video-pruning-rate", "0.5"),
    ):
        pass
