"""vLLM with the plugin answers as Hugging Face with fftriton does: cold, and with any part of the prompt cached."""

from contextlib import contextmanager
from functools import partial

import numpy as np
import peft
import pytest
from served import (
    IMAGE,
    NEEDLE,
    START,
    VIDEO,
    WORDS,
    HuggingFace,
    Request,
    make_frames,
    write_llava_onevision,
    write_qwen2_5_vl,
    write_qwen3_vl,
)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from fftriton.methods.text import parse, to_dict
from fftriton.runtime.video import read_video

BLOCK = 32
CHUNKS = (32, 64, 4096)
METHODS = (
    "temporalmerge", "uniformframes", "randomtokens:seed=3", "kvtp", "kvtp:pruner=prumerge", "evs", "vidcom2", "dycoke",
    "visionzip", "flashvid", "fastvid",
)  # fmt: skip
QUESTIONS = ("Which digit is on the red box?", "Where is the red box?")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava_onevision")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Architecture, folder, Hugging Face's model, video, its grid of tokens, and how many more follow it."""
    if request.param == "qwen2_vl":
        video = read_video(NEEDLE.parent / "clips" / "needle.mp4", 16).frames
        return "Qwen2VLForConditionalGeneration", NEEDLE, HuggingFace(NEEDLE), np.asarray(video), (16, 16), 0
    grid, further = ((12, 16), 1) if request.param == "llava_onevision" else ((6, 20), 0)
    write, architecture = {
        "qwen2_5_vl": (write_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration"),
        "qwen3_vl": (write_qwen3_vl, "Qwen3VLForConditionalGeneration"),
        "qwen3_vl_moe": (partial(write_qwen3_vl, mixture=True), "Qwen3VLMoeForConditionalGeneration"),
        "llava_onevision": (write_llava_onevision, "LlavaOnevisionForConditionalGeneration"),
    }[request.param]
    folder = write(tmp_path_factory.mktemp("model"))
    return architecture, folder, HuggingFace(folder), make_frames(12, 128, 160, 0), grid, further


@contextmanager
def engine(architecture, folder, method, **arguments):
    settings = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 4, "block_size": BLOCK,
        "limit_mm_per_prompt": {"image": 2, "video": 2}, "enable_prefix_caching": True,
    } | arguments  # fmt: skip
    if method is not None:
        settings["hf_overrides"] = {"architectures": [f"FFTriton{architecture}"], "fftriton": to_dict(method)}
    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # at once: another one cannot be made before


def answers(llm, requests, count=16):
    sampling = SamplingParams(max_tokens=count, temperature=0, logprobs=5, ignore_eos=True, allowed_token_ids=WORDS)
    return llm.generate([request.for_vllm() for request in requests], sampling, use_tqdm=False)


def assert_equal(out, request, method, reference, count=16):
    """First the log-probabilities of the first token, then all tokens."""
    expected = reference.log_probabilities(request, method)
    for token, got in out.outputs[0].logprobs[0].items():
        assert abs(got.logprob - float(expected[token])) < 1e-3
    assert list(out.outputs[0].token_ids) == reference.answer(request, method, count)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("text", METHODS)
def test_a_prompt_cold_and_from_the_cache(family, text, chunk):
    architecture, folder, reference, video, (frames, patches), further = family
    method = parse(text, 0.3)
    count = method.count(frames, patches) + further
    relevance = [np.linspace(-2, 3, frames).tolist()] if "kvtp" in text else None
    with engine(architecture, folder, method, max_num_batched_tokens=chunk) as llm:
        for begin in (START, START + "<sys>" * (-(4 + count) % BLOCK)):  # the second video ends with a block
            asked = [Request(begin + VIDEO + "<q>" + question, [video], relevance=relevance) for question in QUESTIONS]
            cached = []
            for request in (*asked, asked[0]):
                [out] = answers(llm, [request])
                assert sum(token == llm_token(llm, "video") for token in out.prompt_token_ids) == count
                assert_equal(out, request, method, reference)
                cached.append(out.num_cached_tokens)
            whole = (4 + count + begin.count("<sys>") - 2) // BLOCK * BLOCK
            assert cached[0] == 0 or begin != START
            assert cached[1] >= whole > 0


def llm_token(llm, kind):
    return getattr(llm.llm_engine.model_config.hf_config, f"{kind}_token_id")


@pytest.mark.parametrize("text", ["temporalmerge", "kvtp"])
def test_several_videos_and_images(family, text):
    architecture, folder, reference, video, (frames, _), _ = family
    method = parse(text, 0.3)
    longer = make_frames(len(video), *video.shape[1:3], seed=5)
    picture = make_frames(1, *video.shape[1:3], seed=9)[0]
    scores = [np.linspace(-2, 3, frames).tolist(), np.linspace(3, -1, frames).tolist()]
    several = [
        Request(START + VIDEO + "<q>Where is it?" + VIDEO + "<q>" + QUESTIONS[0], [video, longer]),
        Request(START + IMAGE + VIDEO + IMAGE + "<q>" + QUESTIONS[0], [longer], [picture, picture[:, ::-1].copy()]),
        Request(START + IMAGE + "<q>" + QUESTIONS[1], [], [picture]),
        Request(START + "<q>" + QUESTIONS[1]),
    ]
    if text == "kvtp":
        several[0] = Request(several[0].text, several[0].videos, relevance=scores)
        several.append(Request(several[0].text, [longer, video], relevance=scores[::-1]))  # each one is cached
        several.append(Request(several[0].text, [video, longer], relevance=scores[::-1]))
    with engine(architecture, folder, method, max_num_batched_tokens=64) as llm:
        for request, out in zip(several, answers(llm, several), strict=True):
            assert_equal(out, request, method, reference)
        for request in several:
            assert_equal(answers(llm, [request])[0], request, method, reference)


@pytest.mark.parametrize("relevance", [True, False])
def test_two_questions_about_one_video_do_not_share_its_tokens(family, relevance):
    architecture, folder, reference, video, (frames, _), _ = family
    method = parse("kvtp:temperature=0.2", 0.2)
    rising = np.linspace(-2, 3, frames).tolist()
    requests = [
        Request(START + VIDEO + "<q>" + QUESTIONS[0], [video], relevance=[scores] if relevance else None)
        for scores in (rising, rising[::-1], rising)
    ]
    with engine(architecture, folder, method, max_num_batched_tokens=64) as llm:
        outs = answers(llm, requests)
        for request, out in zip(requests, outs, strict=True):
            assert_equal(out, request, method, reference)
    expected = [reference.log_probabilities(request, method) for request in requests[:2]]
    assert bool((expected[0] - expected[1]).abs().max() > 1e-2) == relevance  # they would be told apart


def test_bfloat16_positions_above_256():
    """A position that is rounded moves the answer by much more than bfloat16 does."""
    video = make_frames(400, 64, 64, 1)
    request = Request(START + VIDEO + "<q>" + QUESTIONS[0], [video])
    method = parse("uniformframes", 0.1)
    reference = HuggingFace(NEEDLE)
    expected = reference.log_probabilities(request, method)
    arguments = {"max_num_batched_tokens": 1024, "dtype": "bfloat16", "max_model_len": 2048}
    with engine("Qwen2VLForConditionalGeneration", NEEDLE, method, **arguments) as llm:
        [out] = answers(llm, [request], 1)
    for token, got in out.outputs[0].logprobs[0].items():
        if float(expected[token]) > -5:
            assert abs(got.logprob - float(expected[token])) < 0.15


def test_requests_with_an_adapter_of_their_own(tmp_path):
    reference, video = HuggingFace(NEEDLE), np.asarray(read_video(NEEDLE.parent / "clips" / "needle.mp4", 16).frames)
    request, method = Request(START + VIDEO + "<q>" + QUESTIONS[0], [video]), parse("temporalmerge", 0.3)
    plain = reference.log_probabilities(request, method)
    adapter = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = HuggingFace(NEEDLE)
    adapted.model = peft.get_peft_model(adapted.model, adapter)
    adapted.model.save_pretrained(tmp_path)
    assert (adapted.log_probabilities(request, method) - plain).abs().max() > 0.1
    sampling = SamplingParams(max_tokens=16, temperature=0, logprobs=5, ignore_eos=True, allowed_token_ids=WORDS)
    arguments = {"max_num_batched_tokens": 64, "enable_lora": True, "max_lora_rank": 8}
    with engine("Qwen2VLForConditionalGeneration", NEEDLE, method, **arguments) as llm:
        for lora, model in ((LoRARequest("own", 1, str(tmp_path)), adapted), (None, reference)):
            [out] = llm.generate([request.for_vllm()], sampling, use_tqdm=False, lora_request=lora)
            assert_equal(out, request, method, model)
