"""`apply_framefusion` on the models of the paper: the tokens and the logits of the published rule, at its 28 layers.

The token ranges are those of the published code, read from ids and bounds by the formulas that it has for each class.
"""

import authors_rule
import pytest
import remote_models as remote
import torch
from remote_prompts import film, listening, logits_of, pixels, words

import fftriton

LAYERS = authors_rule.DEPTH
STILL, LIVELY = 0.0, 1.0  # merging alone meets the cost; layers of merging, then pruning


def check(model, call, patch_of):
    """That a call gives what the published rule gives. patch_of: N -> the column of each token, -1 for text."""
    with torch.no_grad(), listening(model) as seen:
        call()
    embeddings = seen[0][0]
    patch = patch_of(len(embeddings))
    logits, kept = authors_rule.run(getattr(model, "llm", model), embeddings, patch)
    reduction = fftriton.apply_framefusion(model, 0.3, 0.6, 0.1)
    with torch.no_grad():
        reduced = call()
    reduction.remove()
    assert [layer.tolist() for layer in reduction.report.kept_positions] == [layer.tolist() for layer in kept]
    assert (logits_of(reduced)[0, -1] - logits).abs().max() < 1e-4
    return reduction.report


def columns(start, size, count, length):
    """[length] int64: from `start` on, `count` tokens have the columns 0 to size - 1, again and again."""
    patch = torch.full((length,), -1)
    patch[start : start + count] = torch.arange(count) % size
    return patch


@pytest.mark.parametrize(("mode", "size", "fresh"), [("bilinear", 210, LIVELY), ("average", 182, STILL)])
def test_llava_video(mode, size, fresh):
    model = remote.llava_qwen(LAYERS, side=27, mm_spatial_pool_mode=mode, tokenizer_model_max_length=32768)
    ids = torch.tensor([[*words(14), remote.PLACEHOLDER, *words(8, 1)]])
    report = check(
        model,
        lambda: model(ids, images=[pixels(4, 27, fresh=fresh)], modalities=["video"]),
        lambda length: columns(14, size, length - 22, length),
    )
    assert (report.prune_layer is None) == (fresh == STILL)
    assert report.num_video_tokens == 4 * size


@pytest.mark.parametrize(
    ("side", "frames", "fresh", "encoder", "settings"),
    [
        (16, 4, LIVELY, remote.BasicVideoEncoder, {}),
        (11, 8, LIVELY, remote.BasicVideoEncoder, {}),
        (16, 32, STILL, remote.TSPVideoEncoder, {"pool_sizes": [[8, 1, 1]]}),
    ],
    ids=["256", "lite", "tsp"],
)
def test_nvila(side, frames, fresh, encoder, settings):
    model = remote.nvila(LAYERS, side, encoder=encoder, **settings)
    pooled = frames // settings.get("pool_sizes", [[1]])[0][0]
    ids = torch.tensor([[*words(14), 151, *words(8, 1)]])
    report = check(
        model,
        lambda: model(ids, media={"video": [pixels(frames, side, fresh=fresh)]}),
        lambda length: columns(14, (length - 22) // pooled, length - 22, length),
    )
    assert (report.prune_layer is None) == (fresh == STILL)
    assert report.num_video_tokens == pooled * (side**2 + 1)


@pytest.mark.parametrize(("count", "fresh"), [(1, STILL), (1, LIVELY), (3, LIVELY)])
def test_minicpm_v(count, fresh):
    model = remote.minicpm_v(LAYERS)
    frames = list(film(9 // count + 1, count * 64, fresh=fresh).unflatten(1, (count, 64)))
    inputs = remote.Processor()([[*frames, *words(8)]])
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    bound = inputs["image_bound"][0]
    first, last = int(bound[0, 0]), int(bound[-1, 1]) + 2
    size = int(bound[count, 0]) - first
    report = check(model, lambda: model(inputs), lambda length: columns(first, size, last - first, length))
    assert (report.prune_layer is None) == (fresh == STILL)
    assert size == {1: 67, 3: 199}[count]
    assert report.num_video_tokens == last - first
