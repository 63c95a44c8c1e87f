"""FrameFusion as its published code does it, in plain PyTorch: one sample, no cache, 28 layers taken for granted.

Source: FrameFusion, ICCV 2025, arXiv:2501.01986, and what its code does with the token ranges that it is given.
"""

import torch
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

DEPTH = 28


class AuthorsRule:
    """The rule for one prompt.

    Args:
        patch: [N], the column of each token, the same in every frame; -1 for text.
        cost, similarity, ratio: budget, and the bounds of similarity and of the share that merges.
    """

    def __init__(self, patch, cost, similarity, ratio):
        self.patch, self.position = patch, torch.arange(len(patch))
        self.cost, self.similarity, self.ratio = cost, similarity, ratio
        self.shares, self.merging, self.pruning = [], True, True

    def share_to_go(self):
        """The share of the tokens that would have to go now, so that the layers left just meet the cost."""
        left, spent = 1.0, 0.0
        for share in self.shares:
            left *= 1 - share
            spent += left
        return max(0.0, 1 - (DEPTH * self.cost - spent) / ((DEPTH - len(self.shares)) * left))

    def merge(self, hidden):
        """[n, D] -> [m, D]: each token joins the one before it of its column, if they are alike."""
        rows = [(self.patch == column).nonzero()[:, 0] for column in range(int(self.patch.max()) + 1)]
        pairs = torch.cat([torch.stack([own[:-1], own[1:]]) for own in rows], 1)
        alike = cosine_similarity(hidden[pairs[0]], hidden[pairs[1]], dim=-1)
        count, bound = int((self.patch >= 0).sum()), self.share_to_go()
        joins = alike >= self.similarity
        share = int(joins.sum()) / count
        if share < bound:
            self.shares.append(share)
            self.merging = share >= self.ratio
        else:
            joins = torch.zeros_like(joins)
            joins[alike.topk(int(bound * count)).indices] = True
            self.merging = self.pruning = False
        root = torch.arange(len(hidden))
        for before, after in pairs[:, joins].T.tolist():  # column by column, frame by frame
            root[after] = root[before]
        merged = torch.zeros_like(hidden).index_add(0, root, hidden)
        merged /= root.bincount(minlength=len(hidden)).clamp(min=1)[:, None]
        return self.keep(root == torch.arange(len(hidden)), merged)

    def prune(self, hidden, attention):
        """[n, D] -> [m, D]: the tokens stay that the last query attends to most. attention: [n]."""
        video = (self.patch >= 0).nonzero()[:, 0]
        count = round(len(video) * (1 - self.share_to_go()))
        kept = self.patch < 0
        kept[video[attention[video].topk(count).indices]] = True
        self.pruning = False
        return self.keep(kept, hidden)

    def keep(self, kept, hidden):
        self.patch, self.position = self.patch[kept], self.position[kept]
        return hidden[kept]


@torch.no_grad()
def run(model, embeddings, patch, cost=0.3, similarity=0.6, ratio=0.1):
    """Run a Qwen2ForCausalLM on embeddings [N, D].

    Returns:
        The logits [V] of the last token, and the positions in the attention of each layer.
    """
    decoder, rule, hidden, kept = model.model, AuthorsRule(patch, cost, similarity, ratio), embeddings, []
    rotary = [part[0] for part in decoder.rotary_emb(embeddings[None], torch.arange(len(embeddings))[None])]
    for index, layer in enumerate(decoder.layers):
        if index == 0:
            hidden = rule.merge(hidden)
        kept.append(rule.position)
        added, queries, keys = attend(layer, layer.input_layernorm(hidden), [part[rule.position] for part in rotary])
        hidden = hidden + added
        if rule.merging:
            hidden = rule.merge(hidden)
        elif rule.pruning:
            scores = queries[:, -1:] @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
            hidden = rule.prune(hidden, scores.softmax(-1).mean((0, 1)))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden[-1])), kept


def attend(layer, hidden, rotary):
    """[n, D] -> what attention adds, and its queries and keys [H, n, d]."""
    attention = layer.self_attn
    queries, keys, values = (
        project(hidden).unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = (turn(part, *rotary) for part in (queries, keys))
    groups = len(queries) // len(keys)
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    mixed = scaled_dot_product_attention(queries[None], keys[None], values[None], is_causal=True)[0]
    return attention.o_proj(mixed.transpose(0, 1).flatten(1)), queries, keys


def turn(part, cosine, sine):
    """Rotary embedding of [H, n, d]."""
    first, second = part.chunk(2, -1)
    return part * cosine + torch.cat([-second, first], -1) * sine
