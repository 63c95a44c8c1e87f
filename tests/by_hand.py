"""A reduction by a script, and the same written out by hand: no cache, no hooks, no kernels."""

from dataclasses import dataclass, field

import torch

import fftriton
from fftriton_kernels import merge_roots

STEPS = 12


@torch.no_grad()
def generate(model, inputs, **arguments):
    """Greedy tokens [steps] and logits [steps, V]."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **arguments
    )
    return out.sequences[0, -STEPS:], torch.cat(out.logits)


def decoder_of(model):
    """The text model inside a conditional generation model, or of a causal one."""
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


@dataclass(frozen=True)
class Scripted(fftriton.Method):
    """Merges with the patch before from a similarity threshold, or drops every third video token, where told."""

    merge_before: tuple = (0,)
    merge_after: tuple = (1,)
    drop_after: tuple = (0, 3)
    kept: list = field(default_factory=list, compare=False)

    def before_attention(self, layer, tokens):
        return self.merge(tokens) if layer in self.merge_before else None

    def after_attention(self, layer, tokens):
        if layer in self.merge_after:
            return self.merge(tokens)
        if layer in self.drop_after:
            scores = -(places(tokens) % 3 == 0).float()
            return tokens.keep_top(scores, tokens.num_video - 2)
        return None

    def merge(self, tokens):
        every_second = (places(tokens) % 2).float()  # 1 joins
        return tokens.merge_groups(merge_roots(every_second, tokens.predecessor, 0.5))


def places(tokens):
    """[B, N] positions from the first token on that is no padding, which stays."""
    return tokens.position - tokens.position[:, :1]


class ByHand:
    """The scripted reduction, every layer run on its rows from the first token on."""

    def __init__(self, model, patch):
        self.model, self.decoder, self.patch = model, decoder_of(model), patch

    def merge(self, position):
        """Groups of rows: row t joins the row before it of the same patch where its position is odd."""
        group, last = {}, {}
        for row, place in enumerate(position):
            before = last.get(self.patch_of(place)) if self.patch_of(place) >= 0 else None
            last[self.patch_of(place)] = row
            joins = before is not None and place % 2 == 1
            group[row] = group[before] if joins else row
        return [[row for row in group if group[row] == root] for root in sorted(set(group.values()))]

    def drop(self, position):
        """Groups of one row: all but the two video rows that go first, positions that 3 divides, the last first."""
        video = [place for place in position if self.patch_of(place) >= 0]
        order = sorted(video, key=lambda place: (place % 3 == 0, place))
        return [[row] for row, place in enumerate(position) if place not in order[len(video) - 2 :]]

    def patch_of(self, place):
        return self.patch[place] if place < len(self.patch) else -1

    def __call__(self, embeddings, position_ids, script, additions=()):
        """[1, N, D] -> logits [V] of the last row. additions: [1, N, D] each, added behind the first layers."""
        hidden, position, additions = embeddings, list(range(embeddings.shape[1])), list(additions)
        rotary = self.decoder.rotary_emb(embeddings, position_ids)

        def reduce(groups):
            nonlocal hidden, position, additions
            hidden, *additions = (
                torch.stack([part[0, rows].mean(0) for rows in groups])[None] for part in (hidden, *additions)
            )
            position = [position[rows[0]] for rows in groups]

        for index, layer in enumerate(self.decoder.layers):
            if index in script.merge_before:
                reduce(self.merge(position))
            hidden = hidden + self.mix(layer, layer.input_layernorm(hidden), position, rotary)
            if index in script.merge_after:
                reduce(self.merge(position))
            elif index in script.drop_after:
                reduce(self.drop(position))
            fed = layer.mlp(layer.post_attention_layernorm(hidden))
            hidden = hidden + (fed[0] if isinstance(fed, tuple) else fed)  # experts come with their routing in 4.x
            if index < len(additions):
                hidden = hidden + additions[index]
        return self.model.lm_head(self.decoder.norm(hidden)[0, -1])

    def mix(self, layer, hidden, position, rotary):
        """Attention, or what the layer has in its place."""
        if not hasattr(layer, "self_attn"):
            return layer.linear_attn(hidden_states=hidden)
        rows = len(position)
        mask = torch.full((1, 1, rows, rows), torch.finfo(hidden.dtype).min).triu(1)
        rotary = tuple(part[..., position, :] for part in rotary)
        return layer.self_attn(hidden_states=hidden, attention_mask=mask, position_embeddings=rotary)[0]

    @torch.no_grad()
    def check(self, prompt, script, tokens, logits):
        """That these greedy tokens [steps] and logits [steps, V] are what comes out by hand."""
        embeddings, position_ids, additions = prompt.embeddings, prompt.position_ids, prompt.additions
        last = position_ids[..., -1:].max()
        for step, token in enumerate(tokens):
            expected = self(embeddings, position_ids, script, additions)
            assert (logits[step] - expected).abs().max() < 1e-4
            assert int(expected.argmax()) == int(token)
            embeddings = torch.cat([embeddings, self.decoder.embed_tokens(token)[None, None]], 1)
            position_ids = torch.cat([position_ids, (last + 1 + step).expand_as(position_ids[..., :1])], -1)
            additions = [torch.cat([part, torch.zeros_like(part[:, :1])], 1) for part in additions]


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
def see_prompt(model, inputs):
    """Run the model as it is and note what its decoder gets."""
    decoder, seen = decoder_of(model), {}
    hooks = [
        decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True),
        decoder.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(rotary=kwargs.get("position_ids", args[-1])), with_kwargs=True
        ),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    embeddings = seen["inputs_embeds"]
    additions = []
    for features in seen.get("deepstack_visual_embeds") or ():
        additions.append(torch.zeros_like(embeddings))
        additions[-1][seen["visual_pos_masks"]] = features
    return SeenPrompt(embeddings, seen["rotary"], tuple(additions))


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
