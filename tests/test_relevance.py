"""Relevance by SigLIP: against the model's own forward, the fusion head against its formula, and files."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_qwen2_vl, video_prompt
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fftriton
from bench.kvtp.small import small_siglip
from bench.kvtp.train import clip_logits, relevance_loss
from fftriton.methods import FrameContext, FrameRows, VideoTokens
from fftriton.relevance import BoundRelevance, ContextFusion, Patches, SiglipRelevance
from fftriton.relevance.patches import token_grid

WORDS = ["when", "does", "the", "red", "green", "box", "appear", "where", "is"]
QUESTION = "When does the red box appear"


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (7, 40, 48, 3), dtype=np.uint8)


@pytest.mark.parametrize("naflex", [False, True], ids=["siglip", "siglip2-naflex"])
@torch.no_grad()
def test_logits_are_the_models_own(frames, naflex):
    relevance = small_siglip(WORDS, naflex=naflex)
    relevance.batch_size = 3  # the last batch is smaller
    scores = relevance(frames, QUESTION)
    text = relevance.tokenizer([QUESTION.lower()], padding="max_length", max_length=16, return_tensors="pt")
    pixels = relevance.image_processor(images=list(frames), return_tensors="pt")
    expected = relevance.model(input_ids=text["input_ids"], **pixels).logits_per_image[:, 0]
    assert scores.shape == (7,)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert scores.std() > 1e-4


def test_frames_may_be_an_array_a_tensor_or_pictures(frames):
    relevance = small_siglip(WORDS)
    features = relevance.encode(frames, progress=False)
    assert torch.equal(features, relevance.encode(torch.from_numpy(frames), progress=False))
    assert torch.equal(features, relevance.encode(list(frames), progress=False))


def test_features_serve_for_the_next_question(frames, monkeypatch):
    relevance = small_siglip(WORDS)
    features = relevance.encode(frames)
    first = relevance(frames, QUESTION)
    monkeypatch.setattr(relevance.model, "get_image_features", None)  # the tower is not asked again
    assert torch.equal(relevance.score(features, QUESTION), first)
    assert not torch.equal(relevance.score(features, "where is the green box"), first)


def test_a_long_question_is_the_best_of_its_parts(frames):
    relevance = small_siglip(WORDS)  # 16 tokens, one of which ends the text
    features = relevance.encode(frames)
    for long in (" ".join(WORDS * 4), "red " * 15 + "green " * 15, "green " * 15 + "red " * 15):
        chunks = relevance.chunks(long)
        assert " ".join(chunks) == long.strip()
        assert max(len(chunk.split()) for chunk in chunks) <= 15
        parts = torch.stack([relevance.score(features, chunk) for chunk in chunks])
        torch.testing.assert_close(relevance.score(features, long), parts.amax(0), rtol=0, atol=1e-5)
    assert [len(chunk.split()) for chunk in relevance.chunks(" ".join(WORDS * 4))] == [9, 9, 9, 9]
    assert relevance.chunks("red " * 15) == [("red " * 15).strip()]
    red, green = (relevance.score(features, f"{colour} " * 15) for colour in ("red", "green"))
    assert (red - green).abs().min() > 1e-4  # so that the first part is the wrong one in one of the orders


def test_shows_a_progress_bar(frames, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    relevance = small_siglip(WORDS)
    relevance.encode(frames, progress=False)
    assert capsys.readouterr().err == ""
    relevance.encode(frames)
    assert "frames" in capsys.readouterr().err


@pytest.mark.parametrize("scaled", [True, False])
def test_fusion_head_by_its_formula(scaled):
    head = ContextFusion(clip=3, scaled=scaled).double()
    taus = torch.tensor([0.5, 0.27], dtype=torch.float64)
    with torch.no_grad():
        head.log_temperature.copy_(taus.log())
    images, texts = torch.randn(2, 7, 16).double(), torch.randn(2, 5, 16).double()
    unit = F.normalize(images, dim=-1)
    for video in range(2):
        for i in range(7):
            parts = [images[video, i]]
            for neighbours, tau in (([j for j in range(7) if j // 3 == i // 3], taus[0]), (range(7), taus[1])):
                factor = tau * (4.0 if scaled else 1.0)
                weight = torch.stack([(unit[video, i] @ unit[video, j]) / factor for j in neighbours]).softmax(0)
                parts.append(sum(w * images[video, j] for w, j in zip(weight, neighbours, strict=True)))
            cosines = [F.cosine_similarity(part[None], texts[video]) for part in parts]
            expected = 0.9 * cosines[0] + 0.05 * cosines[1] + 0.05 * cosines[2]
            torch.testing.assert_close(head(images, texts)[video, i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [40, 43])
def test_fusion_and_its_loss_are_the_authors(frames):
    """Recorded from their code: 43 frames in clips of 8 for the context, the first 40 for the loss."""
    recorded = load_file(Path(__file__).parent / "golden" / "kvtp" / "fusion.safetensors")
    head = ContextFusion(clip=8)
    with torch.no_grad():
        head.log_temperature.copy_(recorded["log_temperature"])
    if frames == 43:
        for name, context in zip(("local", "global"), head.context(recorded["frames"]), strict=True):
            torch.testing.assert_close(F.normalize(context, dim=-1), recorded[name], rtol=0, atol=1e-5)
        return
    scale, bias = recorded["scale_bias"]
    logits = scale.exp() * head(recorded["frames"][:40], recorded["questions"]) + bias
    clips = clip_logits(logits.amax(-1), 8)
    torch.testing.assert_close(clips, recorded["clip_logits_40"], rtol=0, atol=1e-5)
    loss = relevance_loss(clips, recorded["labels"])
    loss.backward()
    torch.testing.assert_close(loss, recorded["loss_40"], rtol=0, atol=1e-5)
    torch.testing.assert_close(head.log_temperature.grad, recorded["grad_log_temperature"], rtol=0, atol=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@torch.no_grad()
def test_the_context_of_a_long_video_takes_no_square_of_its_frames():
    images = torch.randn(2051, 8, generator=torch.Generator().manual_seed(0))
    head = ContextFusion(clip=8)
    with Largest() as mode:
        local, everywhere = head.context(images)
    assert mode.numel < len(images) ** 2 / 7
    unit = F.normalize(images, dim=-1)
    similar = unit @ unit.T / math.sqrt(8)
    torch.testing.assert_close(everywhere, similar.softmax(-1) @ images, rtol=0, atol=1e-5)
    torch.testing.assert_close(local[2048:], similar[2048:, 2048:].softmax(-1) @ images[2048:], rtol=0, atol=1e-5)


def test_the_scale_makes_attention_almost_uniform():
    """At the width of SigLIP so400m, what frames see of their video differs a hundred times less with it."""
    images = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    spread = [ContextFusion(scaled=scaled).context(images)[1].std(0).mean() for scaled in (True, False)]
    assert spread[0] < 0.02 * images.std()
    assert spread[1] > 10 * spread[0]


def test_head_counts_in_inference_and_travels_with_the_checkpoint(frames, tmp_path):
    relevance = small_siglip(WORDS, head=ContextFusion(clip=4, scaled=False))
    with torch.no_grad():
        relevance.head.log_temperature.copy_(torch.tensor([-2.0, -3.0]))
    fused = relevance(frames, QUESTION)
    relevance.save_pretrained(tmp_path)
    loaded = SiglipRelevance.from_pretrained(tmp_path)
    assert (loaded.head.clip, loaded.head.scaled) == (4, False)
    assert torch.equal(loaded.head.log_temperature, relevance.head.log_temperature)
    torch.testing.assert_close(loaded(frames, QUESTION), fused, rtol=0, atol=1e-6)
    relevance.head = None
    assert (relevance(frames, QUESTION) - fused).abs().max() > 1e-3
    other = SiglipRelevance.from_pretrained(tmp_path, head=ContextFusion())
    assert other.head.clip == 8


@pytest.mark.parametrize("naflex", [False, True])
def test_a_checkpoint_without_a_head(frames, tmp_path, naflex):
    relevance = small_siglip(WORDS, naflex=naflex)
    relevance.save_pretrained(tmp_path)
    loaded = SiglipRelevance.from_pretrained(tmp_path)
    assert loaded.head is None
    if naflex:
        loaded.tokenizer = relevance.tokenizer  # AutoTokenizer takes SigLIP 2's own class, whatever was saved
    torch.testing.assert_close(loaded(frames, QUESTION), relevance(frames, QUESTION), rtol=0, atol=1e-6)


def test_head_of_another_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"path must hold what ContextFusion.save wrote, got .*other.safetensors"):
        ContextFusion.load(tmp_path / "other.safetensors")


def test_runs_kvtp():
    """Eight frames of a video, whose tokens stand for two each: the higher score of a pair counts."""
    frames = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    relevance = small_siglip(WORDS)
    bound = relevance.bind(relevance.encode(frames), QUESTION)
    assert torch.equal(bound.scores, relevance.bind(frames, QUESTION).scores)
    model, inputs = tiny_qwen2_vl(2), video_prompt(grids=((4, 4, 6),))
    with torch.no_grad(), fftriton.reduce(model, fftriton.KVTP(0.5, bound, temperature=0.01)) as reduction:
        model(**inputs)
    kept = reduction.report.kept_positions[0]
    counts = [int(torch.isin(frame, kept).sum()) for frame in reduction.report.layouts[0].positions]
    assert counts == fftriton.frame_budgets(bound.scores.view(4, 2).amax(1), 6, 0.5, temperature=0.01).tolist()


def context_of(frames, seed=0, width=8):
    """A video of this many frames of three tokens."""
    x = torch.randn(frames, 3, width, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(3 * frames).view(frames, 3)
    tokens = VideoTokens(x.view(1, -1, width), rows.view(1, -1), (rows % 3).view(1, -1), 3 * frames)
    return FrameContext(0, 0, FrameRows(rows), tokens)


def test_an_odd_number_of_frames():
    bound = BoundRelevance(torch.tensor([1.0, 2, 5, 3, 0, -1, -7]))
    assert bound(context_of(4)).tolist() == [2, 5, 0, -7]
    for taken, frames in ((3, 4), (9, 4), (12, 4), (28, 4)):
        with pytest.raises(ValueError, match=rf"whose tokens make {frames} frames, got {taken}"):
            BoundRelevance(torch.zeros(taken))(context_of(frames))


def test_a_binding_belongs_to_its_video():
    bound = BoundRelevance(torch.tensor([1.0, 2, 5, 3]))
    context = context_of(4)
    rounded = replace(context, tokens=replace(context.tokens, hidden=context.tokens.hidden.bfloat16()))
    assert torch.equal(bound(context), bound(rounded))
    assert torch.equal(bound(context_of(4, width=16)), bound.scores)  # of another model
    with pytest.raises(ValueError, match="a relevance belongs to the video that it was first used for"):
        bound(context_of(4, seed=1))
    assert torch.equal(bound(context), bound.scores)


def test_the_cost_of_a_predictor(frames):
    """Operations by the formula of each part; seconds of both towers, or of one if the features are given."""
    relevance = small_siglip(WORDS, side=32, patch=8, width=64, depth=2)
    width, patches, length, depth = 64, 16, 16, 2
    layer = [n * 8 * width * width + 2 * n * n * width for n in (patches, length)]
    head = 2 * patches * width**2 + 2 * width**2 + 2 * patches * width + 4 * width**2
    vision = depth * layer[0] + patches * 3 * 8 * 8 * width + head
    text = depth * layer[1] + width * width
    bound = relevance.bind(frames, QUESTION)
    assert bound.macs == len(frames) * vision + text
    looked = relevance.look(frames)
    assert looked.macs == len(frames) * vision
    assert looked.seconds > 0
    again = relevance.bind(looked, QUESTION)
    assert torch.equal(again.scores, bound.scores)
    assert again.seconds > looked.seconds
    long = " ".join(WORDS * 4)
    assert relevance.bind(relevance.encode(frames), long).macs == len(relevance.chunks(long)) * text


@torch.no_grad()
@pytest.mark.parametrize("naflex", [False, True], ids=["siglip", "siglip2-naflex"])
def test_patches_are_those_of_the_pooling_head(frames, naflex):
    relevance = small_siglip(WORDS, naflex=naflex)
    relevance.batch_size = 3
    frames = frames[:, :24]
    patches = relevance.look(frames, patches=True).patches
    pixels, tower = relevance.pixels(frames), relevance.model.vision_model
    last = tower(**pixels).last_hidden_state
    rows, columns = patches.attention.shape[1:]
    last = last[:, : rows * columns]
    assert (rows, columns) == (tuple(pixels["spatial_shapes"][0].tolist()) if naflex else (4, 4))
    assert (rows != columns) == naflex
    module = tower.head.attention
    query, key, _ = (part for part in module.in_proj_weight.split(64))
    bias = module.in_proj_bias.split(64)
    q = (tower.head.probe[0] @ query.T + bias[0]).view(4, 16)
    k = last @ key.T + bias[1]
    heads = k.view(len(frames), rows * columns, 4, 16)
    attention = torch.einsum("hd,tnhd->tnh", q / 4, heads).softmax(1).mean(-1)
    torch.testing.assert_close(patches.attention.flatten(1), attention, rtol=0, atol=1e-6)
    torch.testing.assert_close(patches.keys.flatten(1, 2), k, rtol=0, atol=1e-5)
    assert patches.aspect == 24 / 48


def test_patches_of_tokens():
    """Two rows of three tokens for two pictures each: the mean over their place and over both pictures."""
    attention = torch.arange(4 * 4 * 6).float().view(4, 4, 6)
    patches = Patches(attention, torch.stack([attention, -attention], -1), aspect=0.6)
    rows = torch.arange(12).view(2, 6)
    context = FrameContext(0, 0, FrameRows(rows), context_of(4).tokens)
    expected = attention.view(2, 2, 2, 2, 3, 2).mean((1, 3, 5)).flatten(1)
    torch.testing.assert_close(patches.importance(context), expected)
    torch.testing.assert_close(patches.vectors(context), torch.stack([expected, -expected], -1))
    odd = Patches(attention[:3], patches.keys[:3], 0.6).importance(context)  # the last picture stands for both
    torch.testing.assert_close(odd[1], attention[2].view(2, 2, 3, 2).mean((1, 3)).flatten())
    grids = [token_grid(*case) for case in ((196, 1.0), (187, 11 / 17), (187, 17 / 11), (7, 0.5), (12, 4 / 3))]
    assert grids == [(14, 14), (11, 17), (17, 11), (1, 7), (4, 3)]


def test_patches_that_are_not_there(frames):
    relevance = small_siglip(WORDS)
    with pytest.raises(ValueError, match=r"video must be frames or made by look\(frames, patches=True\)"):
        relevance.bind(relevance.encode(frames), QUESTION, patches=True)
    relevance.model.vision_model.head = torch.nn.Identity()
    with pytest.raises(ValueError, match="must have a pooling head with attention to score patches"):
        relevance.look(frames, patches=True)


def test_errors(frames):
    relevance = small_siglip(WORDS)
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\] uint8, got \[7, 40, 48, 3\] of float32"):
        relevance.encode(frames.astype(np.float32))
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\] uint8, got \[40, 48, 3\] of uint8"):
        relevance.encode(frames[0])
    with pytest.raises(ValueError, match="frames must contain at least one picture"):
        relevance.encode([])
    with pytest.raises(ValueError, match="question must be a non-empty string, got ' '"):
        relevance.score(torch.zeros(2, 64), " ")
    with pytest.raises(TypeError, match="model must be a SiglipModel or Siglip2Model, got Linear"):
        SiglipRelevance(torch.nn.Linear(1, 1), None, None)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SiglipRelevance(relevance.model, None, None, batch_size=0)
    with pytest.raises(ValueError, match="ContextFusion: clip must be at least 1, got 0"):
        ContextFusion(clip=0)
