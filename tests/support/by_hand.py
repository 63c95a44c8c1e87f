"""A reduction by a script, and the same written out by hand: no cache, no hooks, no kernels."""

from dataclasses import dataclass, field

import torch
from models import behind
from transformers import DynamicCache

import fftriton
from fftriton_kernels import merge_roots

STEPS = 12
WORDS, VOCABULARY = 150, 160
SPECIAL = [*range(WORDS, VOCABULARY)]  # ids that stand for images and videos


@torch.no_grad()
def generate(model, inputs, **arguments):
    """Greedy words [steps] and logits [steps, V]."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=SPECIAL, **arguments,
    )  # fmt: skip
    return out.sequences[0, -STEPS:], torch.cat(out.logits)


def decoder_of(model):
    """The text model inside a conditional generation model, or of a causal one."""
    inner = model.model
    return getattr(inner, "language_model", getattr(inner, "text_model", inner))


@dataclass(frozen=True)
class Scripted(fftriton.Method):
    """Merges with the patch before from a similarity threshold, or drops every third video token, where told."""

    merge_before: tuple = (0,)
    merge_after: tuple = (1,)
    drop_after: tuple = (0, 3)
    proportional: bool = False
    kept: list = field(default_factory=list, compare=False)

    def begin(self, prompt):
        return ScriptedState(self, prompt)


class ScriptedState(fftriton.methods.MethodState):
    def before_attention(self, layer, tokens):
        return self.merge(tokens) if layer in self.method.merge_before else []

    def after_attention(self, layer, tokens):
        if layer in self.method.merge_after:
            return self.merge(tokens)
        if layer in self.method.drop_after:
            scores = -(places(tokens) % 3 == 0).float()
            return [tokens.keep_top(scores, tokens.num_video - 2)]
        return []

    def merge(self, tokens):
        every_second = (places(tokens) % 2).float()  # 1 joins
        roots = merge_roots(every_second, tokens.predecessor, 0.5)
        return [tokens.merge_groups(roots, self.method.proportional)]


def places(tokens):
    """[B, N] positions from the first token on that is no padding, which stays."""
    return tokens.position - tokens.position[:, :1]


class ByHand:
    """The scripted reduction, every layer run on its rows from the first token on.

    Args:
        model: whose layers run.
        patch: of each position, as `patches` has it.
        starts: where a prompt begins that is reduced on its own: the turns of a conversation, the chunks of a prompt.
    """

    def __init__(self, model, patch, starts=(0,)):
        self.model, self.decoder, self.patch, self.starts = model, decoder_of(model), patch, starts

    def merge(self, position):
        """Groups of rows: row t joins the row before it of the same patch where its position is odd."""
        group, last = {}, {}
        for row, place in enumerate(position):
            of_patch = (self.start_of(place), self.patch_of(place))
            before = last.get(of_patch) if self.patch_of(place) >= 0 else None
            last[of_patch] = row
            joins = before is not None and (place - self.start_of(place)) % 2 == 1
            group[row] = group[before] if joins else row
        return [[row for row in group if group[row] == root] for root in sorted(set(group.values()))]

    def drop(self, position):
        """Groups of one row: in each prompt all but the two video rows that go first, positions that 3 divides, the
        last first."""
        dropped = []
        for start in self.starts:
            video = [place for place in position if self.patch_of(place) >= 0 and self.start_of(place) == start]
            order = sorted(video, key=lambda place: ((place - self.start_of(place)) % 3 == 0, place))
            dropped += order[-2:]
        return [[row] for row, place in enumerate(position) if place not in dropped]

    def patch_of(self, place):
        return self.patch[place] if place < len(self.patch) else -1

    def start_of(self, place):
        return max(start for start in self.starts if start <= place)

    def __call__(self, embeddings, position_ids, script, additions=()):
        """[1, N, D] -> the hidden states [1, n, D] before each layer and behind the last, and their positions.

        additions: [1, N, D] each, added behind the first layers.
        """
        hidden, position, additions = embeddings, list(range(embeddings.shape[1])), list(additions)
        rotary = self.decoder.rotary_emb(embeddings, position_ids)
        states, sizes = [hidden], [1] * len(position)

        def reduce(groups):
            nonlocal hidden, position, additions, sizes
            hidden, *additions = (
                torch.stack([part[0, rows].mean(0) for rows in groups])[None] for part in (hidden, *additions)
            )
            position = [position[rows[0]] for rows in groups]
            sizes = [sum(sizes[row] for row in rows) if script.proportional else sizes[rows[0]] for rows in groups]

        for index, layer in enumerate(self.decoder.layers):
            if index in script.merge_before:
                reduce(self.merge(position))
            hidden = hidden + self.mix(layer, layer.input_layernorm(hidden), position, rotary, sizes)
            if index in script.merge_after:
                reduce(self.merge(position))
            elif index in script.drop_after:
                reduce(self.drop(position))
            fed = layer.mlp(layer.post_attention_layernorm(hidden))
            hidden = hidden + (fed[0] if isinstance(fed, tuple) else fed)  # experts come with their routing in 4.x
            if index < len(additions):
                hidden = hidden + additions[index]
            states.append(hidden)
        return states, position

    def logits(self, prompt, script, tokens=(), last=1):
        """[last + steps, V]: of the prompt's last tokens, and of each of `tokens` behind it."""
        steps = len(tokens)
        more = self.decoder.embed_tokens(torch.as_tensor(tokens, dtype=torch.int64))[None]
        later = prompt.position_ids[..., -1:].max() + 1 + torch.arange(steps)
        states, _ = self(
            torch.cat([prompt.embeddings, more], 1),
            torch.cat([prompt.position_ids, later.expand(*prompt.position_ids.shape[:-1], -1)], -1),
            script,
            [torch.cat([part, torch.zeros_like(more)], 1) for part in prompt.additions],
        )
        return self.model.lm_head(self.decoder.norm(states[-1][0, -last - steps :]))

    def mix(self, layer, hidden, position, rotary, sizes):
        """Attention, or what the layer has in its place."""
        if not hasattr(layer, "self_attn"):
            return layer.linear_attn(hidden_states=hidden)
        rows = len(position)
        mask = torch.full((1, 1, rows, rows), torch.finfo(hidden.dtype).min).triu(1)
        mask = mask + torch.tensor(sizes, dtype=hidden.dtype).log()
        rotary = tuple(part[..., position, :] for part in rotary)
        return layer.self_attn(hidden_states=hidden, attention_mask=mask, position_embeddings=rotary)[0]

    @torch.no_grad()
    def check(self, prompt, script, tokens, logits):
        """That these greedy words [steps] and logits [steps, V] are what comes out by hand."""
        expected = self.logits(prompt, script, tokens[:-1])
        assert (logits - expected).abs().max() < 1e-4
        assert torch.equal(expected[:, :WORDS].argmax(-1), tokens)


@torch.no_grad()
def check_by_hand(model, inputs, layout=None):
    """That the scripted reduction of a prompt, and 12 tokens behind it, are what comes out by hand."""
    script = Scripted()
    with fftriton.reduce(model, script, layout) as reduction:
        tokens, logits = generate(model, inputs)
    prompt = see_prompt(model, inputs)
    patch = patches(reduction.report.layouts, prompt.embeddings.shape[1])
    ByHand(model, patch).check(prompt, script, tokens, logits)
    _, dense = generate(model, inputs)
    assert (dense - logits).abs().max() > 1e-2  # the reduction does change the output


@dataclass(frozen=True)
class SeenPrompt:
    """A prompt as the decoder gets it: embeddings [1, N, D], position ids, what it adds behind its first layers."""

    embeddings: torch.Tensor
    position_ids: torch.Tensor
    additions: tuple


@torch.no_grad()
def see_prompt(model, *turns):
    """Run the model as it is and note what its decoder gets, of several turns on one cache everything together."""
    decoder, parts = decoder_of(model), []
    hooks = [
        decoder.register_forward_pre_hook(lambda _, args, kwargs: parts.append(dict(kwargs)), with_kwargs=True),
        decoder.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: parts[-1].update(rotary=kwargs.get("position_ids", args[-1])), with_kwargs=True
        ),
    ]
    cache = DynamicCache(config=decoder.config) if len(turns) > 1 else None
    for inputs in turns:
        model(**inputs, **behind(cache))
    for hook in hooks:
        hook.remove()
    for part in parts:
        if part.get("inputs_embeds") is None:
            part["inputs_embeds"] = decoder.embed_tokens(part["input_ids"])
    depth = max(len(part.get("deepstack_visual_embeds") or ()) for part in parts)
    additions = zip(*(_full_length(part, depth) for part in parts), strict=True)
    return SeenPrompt(
        torch.cat([part["inputs_embeds"] for part in parts], 1),
        torch.cat([part["rotary"] for part in parts], -1),
        tuple(torch.cat(level, 1) for level in additions),
    )


def _full_length(arguments, depth):
    """Deepstack features [n, D] of one call -> `depth` times [1, N, D], zero elsewhere."""
    full = [torch.zeros_like(arguments["inputs_embeds"]) for _ in range(depth)]
    for level, features in zip(full, arguments.get("deepstack_visual_embeds") or (), strict=False):
        level[arguments["visual_pos_masks"]] = features
    return full


def patches(layouts, length):
    """The patch of each place of a prompt, the same number in every frame; -1 for text."""
    patch, first = [-1] * length, 0
    for layout in layouts:
        for frame in layout.positions.tolist():
            for number, place in enumerate(frame):
                if place >= 0:
                    patch[place] = first + number
        first += layout.positions.shape[1]
    return patch
