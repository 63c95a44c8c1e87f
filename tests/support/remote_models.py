"""Stand-ins for models that exist only as remote code: LLaVA-Video, NVILA, MiniCPM-V 2.6 and InternVL2.5.

Each has the names, the signatures, the order of calls and the arrangement of tokens of the real class, and tiny random
weights. `videos` notes, for the last call, what has been written among the text: (sample, [F, P, 64]) for each video.
"""

import itertools
import math
import threading
from collections import deque
from types import SimpleNamespace

import torch
from models import CACHE, TEXT, rope, seeded
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

PLACEHOLDER, IGNORED = -200, -100
WIDTH = TEXT["hidden_size"]


def text_config(kind=Qwen2Config, num_layers=5, **more):
    return kind(**TEXT, num_hidden_layers=num_layers, **rope(rope_theta=1e4), **more)


class VisionTower(nn.Module):
    """[n, 3, s, s] pixels, one per patch -> [n, s * s, 8]."""

    def __init__(self, num_patches_per_side):
        super().__init__()
        self.num_patches_per_side = num_patches_per_side
        self.patch = nn.Linear(3, 8, bias=False)

    def forward(self, images):
        return self.patch(images.flatten(2).transpose(1, 2))


# ---- LLaVA-Video


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"


class LlavaQwenModel(Qwen2Model):
    config_class = LlavaQwenConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = VisionTower(getattr(config, "side", 5))
        self.mm_projector = nn.Linear(8, WIDTH, bias=False)
        self.image_newline = nn.Parameter(torch.randn(WIDTH))

    def get_vision_tower(self):
        return self.vision_tower


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    config_class = LlavaQwenConfig

    def __init__(self, config):
        super().__init__(config)
        config.model_type = "llava_qwen"
        self.model = LlavaQwenModel(config)
        self.videos = []
        self.post_init()

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def encode_images(self, images):
        return self.get_model().mm_projector(self.get_vision_tower()(images))

    def pool(self, features):
        side = self.get_vision_tower().num_patches_per_side
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        if self.config.mm_spatial_pool_mode == "bilinear":
            grid = nn.functional.interpolate(grid, size=[math.ceil(side / 2)] * 2, mode="bilinear")
        else:
            grid = nn.functional.avg_pool2d(grid, 2)
        return grid  # [F, D, side, side]

    def video_tokens(self, features):
        """Pooled frames with their newlines: [F, P, D], and how many newlines follow."""
        grid, kind = self.pool(features), getattr(self.config, "mm_patch_merge_type", "flat")
        newline = self.model.image_newline[:, None, None]
        where = getattr(self.config, "mm_newline_position", "one_token") if kind.startswith("spatial") else "no_token"
        if where == "grid":
            grid = torch.cat([grid, newline.expand(len(grid), -1, grid.shape[2], 1)], 3)
        tokens = grid.flatten(2)
        if where == "frame":
            tokens = torch.cat([tokens, newline[None, :, :, 0].expand(len(grid), -1, 1)], 2)
        return tokens.transpose(1, 2), int(where == "one_token" and "unpad" in kind)

    def image_tokens(self, features):
        """An image of several tiles loses some of their tokens, as one that is not square does."""
        tokens = features.flatten(0, 1)
        if len(features) > 1:
            tokens = tokens[: -len(features) - 2]
        if "unpad" in getattr(self.config, "mm_patch_merge_type", "flat"):
            tokens = torch.cat([tokens, self.model.image_newline[None]])
        return tokens

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        modalities=["image"], image_sizes=None,  # noqa: B006
    ):  # fmt: skip
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        if isinstance(modalities, str):
            modalities = [modalities]
        videos = {}
        if isinstance(images, list) or images.ndim == 5:
            images = [image[None] if image.ndim == 3 else image for image in images]
            encoded = self.encode_images(torch.cat(list(images))).split([len(image) for image in images])
            features = []
            for index, of_image in enumerate(encoded):
                if modalities[index : index + 1] == ["video"]:
                    tokens, newlines = self.video_tokens(of_image)
                    videos[index] = tokens
                    features.append(torch.cat([tokens.flatten(0, 1), *[self.model.image_newline[None]] * newlines]))
                else:
                    features.append(self.image_tokens(of_image))
        else:
            features = self.encode_images(images)
        given = labels, position_ids, attention_mask
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        labels = torch.full_like(input_ids, IGNORED) if labels is None else labels
        rows, row_labels, index, self.videos = [], [], 0, []
        for sample in range(len(input_ids)):
            ids, own = input_ids[sample][mask[sample]], labels[sample][mask[sample]]
            places = [-1, *(ids == PLACEHOLDER).nonzero()[:, 0].tolist(), len(ids)]
            if len(places) == 2:
                index += 1
            parts, part_labels, length = [], [], 0
            for number, (before, after) in enumerate(itertools.pairwise(places)):
                parts.append(self.get_model().embed_tokens(ids[before + 1 : after]))
                part_labels.append(own[before + 1 : after])
                length += len(parts[-1])
                if number < len(places) - 2:
                    at = index if index < len(features) else index - 1
                    if at in videos:
                        self.videos.append((sample, videos[at]))
                    parts.append(features[at])
                    part_labels.append(own.new_full((len(features[at]),), IGNORED))
                    index += 1
            rows.append(torch.cat(parts))
            row_labels.append(torch.cat(part_labels))
        cut = getattr(self.config, "tokenizer_model_max_length", None)
        rows = [row[:cut] for row, _ in zip(rows, modalities, strict=False)]
        row_labels = [row[:cut] for row, _ in zip(row_labels, modalities, strict=False)]
        side = getattr(self.config, "tokenizer_padding_side", "right")
        embeddings, mask, labels = padded(rows, row_labels, side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return (
            None, None if given[1] is None else positions, None if given[2] is None else mask.to(given[2].dtype),
            past_key_values, embeddings, None if given[0] is None else labels,
        )  # fmt: skip

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, images=None, image_sizes=None,
        return_dict=None, modalities=["image"], dpo_forward=False, cache_position=None, **newer,  # noqa: B006
    ):  # fmt: skip
        if inputs_embeds is None:
            (input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels) = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities, image_sizes
                )
            )
        arguments = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "use_cache": use_cache, "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states, **newer,
        }  # fmt: skip
        if past_key_values is not None:
            arguments[CACHE] = past_key_values
        if dpo_forward:
            return self.lm_head(self.model(**arguments)[0]), labels
        return super().forward(labels=labels, return_dict=return_dict, **arguments)

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, modalities=["image"], **kwargs):  # noqa: B006
        position_ids, attention_mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if images is not None:
            (inputs, position_ids, attention_mask, _, inputs_embeds, _) = self.prepare_inputs_labels_for_multimodal(
                inputs, position_ids, attention_mask, None, None, images, modalities, image_sizes=image_sizes
            )
        else:
            inputs_embeds = self.get_model().embed_tokens(inputs)
        return super().generate(
            position_ids=position_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )


def padded(rows, labels, side):
    """[n, D] and [n] each -> [B, N, D], a mask [B, N] and [B, N]."""
    length = max(map(len, rows))
    embeddings = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask, padded_labels = torch.zeros(len(rows), length, dtype=torch.bool), torch.full((len(rows), length), IGNORED)
    for sample, (row, own) in enumerate(zip(rows, labels, strict=True)):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        embeddings[sample, place], mask[sample, place], padded_labels[sample, place] = row, True, own
    return embeddings, mask, padded_labels


def llava_qwen(num_layers=5, **settings):
    defaults = {
        "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid", "mm_patch_merge_type": "spatial_unpad",
        "tokenizer_model_max_length": 900,
    }  # fmt: skip
    config = text_config(LlavaQwenConfig, num_layers, **defaults | settings)
    return seeded(LlavaQwenForCausalLM(config))


# ---- NVILA


class Words:
    """A tokenizer that knows a few texts."""

    media_token_ids: dict = {"image": 150, "video": 151}  # noqa: RUF012
    ids: dict = {"\n": [9], "<a>": [10, 11], "<sep>": [12]}  # noqa: RUF012

    def __init__(self, padding_side="right"):
        self.padding_side, self.model_max_length = padding_side, 900

    def __call__(self, text):
        return SimpleNamespace(input_ids=self.ids[text])


class BasicVideoEncoder(nn.Module):
    def __init__(self, parent, start_tokens=None, end_tokens="\n"):
        super().__init__()
        self._parent = [parent]
        self.start_tokens, self.end_tokens = start_tokens, end_tokens

    @property
    def parent(self):
        return self._parent[0]

    def embed_tokens(self, tokens):
        if tokens is None:
            return torch.zeros(0, WIDTH)
        return self.parent.llm.model.embed_tokens(torch.tensor(self.parent.tokenizer(tokens).input_ids))

    def around(self, features):
        self.parent.projected[-1].append(features)
        start, end = (
            self.embed_tokens(part).expand(len(features), -1, -1) for part in (self.start_tokens, self.end_tokens)
        )
        return torch.cat([start, features, end], 1).flatten(0, 1)

    def process(self, features):
        return self.around(features)

    def forward(self, videos, config):
        features = self.parent.encode_images(torch.cat(videos)).split([len(video) for video in videos])
        processed = []
        for of_video in features:
            self.parent.projected.append([])
            processed.append(self.process(of_video))
        return processed


class TSPVideoEncoder(BasicVideoEncoder):
    def __init__(self, parent, pool_sizes, start_tokens=None, end_tokens="\n", sep_tokens=None):
        super().__init__(parent, start_tokens, end_tokens)
        self.pool_sizes, self.sep_tokens = pool_sizes, sep_tokens

    def process(self, features):
        side, parts = math.isqrt(features.shape[1]), []
        for time, rows, columns in self.pool_sizes:
            grid = features.view(len(features) // time, time, side // rows, rows, side // columns, columns, -1)
            parts += [self.around(grid.mean((1, 3, 5)).flatten(1, 2)), self.embed_tokens(self.sep_tokens)]
        return torch.cat(parts)


class BasicImageEncoder(BasicVideoEncoder):
    def forward(self, images, config):
        features = self.parent.encode_images(torch.stack(images), block_sizes=config.get("block_sizes"))
        return [torch.cat([of_image, self.embed_tokens(self.end_tokens)]) for of_image in features]


class OfThread:
    """An attribute whose value is that of the thread, as threads may share a model."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, model, owner=None):
        return vars(_OF_THREAD).setdefault((id(model), self.name), [])

    def __set__(self, model, value):
        vars(_OF_THREAD)[id(model), self.name] = value


_OF_THREAD = threading.local()


class LlavaLlamaConfig(Qwen2Config):
    model_type = "llava_llama"


class LlavaLlamaModel(PreTrainedModel):
    config_class = LlavaLlamaConfig
    main_input_name = "input_embeds"
    videos, projected = OfThread(), OfThread()

    def __init__(self, config, num_layers=5, side=4):
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(text_config(num_layers=num_layers))
        self.tokenizer = Words()
        self.vision_tower = VisionTower(side)
        self.mm_projector = nn.Linear(8, WIDTH, bias=False)
        self.encoders = {"image": BasicImageEncoder(self), "video": BasicVideoEncoder(self)}
        self.videos, self.projected = [], []

    def encode_images(self, images, block_sizes=None):
        return self.mm_projector(self.vision_tower(images))

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def _embed(self, input_ids, media, media_config, labels, attention_mask):
        labels = torch.full_like(input_ids, IGNORED) if labels is None else labels
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        text = self.llm.model.embed_tokens(input_ids)
        self.projected, self.videos = [], []
        left = {name: deque(self.encoders[name](media[name], media_config[name])) for name in media}
        projected = deque(self.projected)
        names = {token: name for name, token in self.tokenizer.media_token_ids.items()}
        rows, row_labels = [], []
        for sample in range(len(input_ids)):
            words, own = text[sample][mask[sample]], labels[sample][mask[sample]]
            parts, part_labels = [], []
            for place in range(len(own)):
                name = names.get(input_ids[sample][place].item())
                if name is None:
                    part, part_label = words[place : place + 1], own[place : place + 1]
                else:
                    part = left[name].popleft()
                    part_label = own.new_full((len(part),), IGNORED)
                    if name == "video":
                        self.videos += [(sample, section) for section in projected.popleft()]
                parts.append(part)
                part_labels.append(part_label)
            rows.append(torch.cat(parts))
            row_labels.append(torch.cat(part_labels))
        for name in left:
            if left[name]:
                raise ValueError(f"Not all {name} embeddings are consumed!")
        if self.training:
            rows, row_labels = (
                [part[: self.tokenizer.model_max_length] for part in both] for both in (rows, row_labels)
            )
        embeddings, mask, labels = padded(rows, row_labels, self.tokenizer.padding_side)
        return embeddings, labels, mask

    def forward(
        self, input_ids=None, media=None, images=None, media_config=None, attention_mask=None, position_ids=None,
        past_key_values=None, inputs_embeds=None, labels=None, packing=True, force_packing=False,
        seqlens_in_batch=None, dpo_forward=False, **kwargs,
    ):  # fmt: skip
        if images is not None:
            media = {"image": images}
        if inputs_embeds is None:
            config = media_config or {"image": {}, "video": {}}
            inputs_embeds, labels, attention_mask = self._embed(input_ids, media, config, labels, attention_mask)
        if force_packing:
            inputs_embeds, attention_mask, labels = self.repack(inputs_embeds, attention_mask, labels)
        if past_key_values is not None:
            kwargs[CACHE] = past_key_values
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            **kwargs,
        )

    def repack(self, embeddings, mask, labels):
        return embeddings[mask][None], None, labels[mask][None]

    @torch.inference_mode()
    def generate(self, input_ids=None, media=None, media_config=None, attention_mask=None, **generation_kwargs):
        config = media_config or {"image": {}, "video": {}}
        inputs_embeds, _, attention_mask = self._embed(input_ids, media, config, None, attention_mask)
        return self.llm.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generation_kwargs)


def nvila(num_layers=5, side=4, padding_side="right", encoder=BasicVideoEncoder, **settings):
    model = seeded(LlavaLlamaModel(LlavaLlamaConfig(**TEXT), num_layers, side))
    model.tokenizer.padding_side = padding_side
    model.encoders["video"] = encoder(model, **settings)
    return model


# ---- MiniCPM-V 2.6


class MiniCPMVConfig(Qwen2Config):
    model_type = "minicpmv"


class MiniCPMV(PreTrainedModel):
    config_class = MiniCPMVConfig

    def __init__(self, config):
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config)
        self.resampler = nn.Linear(3, WIDTH, bias=False)
        self.processor = None
        self.videos = []

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_vllm_embedding(self, data):
        if "vision_hidden_states" in data:
            states = data["vision_hidden_states"]
        else:
            states = [self.resampler(torch.stack(units)) if units else [] for units in data["pixel_values"]]
        embeddings = self.llm.model.embed_tokens(data["input_ids"])
        for sample in range(len(data["input_ids"])):
            if len(states[sample]):
                places = torch.stack([torch.arange(start, end) for start, end in data["image_bound"][sample]])
                embeddings[sample].scatter_(
                    0, places.view(-1, 1).repeat(1, WIDTH), states[sample].reshape(-1, WIDTH)
                )  # fmt: skip
        return embeddings, states

    def forward(self, data, **kwargs):
        embeddings, _ = self.get_vllm_embedding(data)
        return self.llm(
            input_ids=None, position_ids=data["position_ids"].long(), inputs_embeds=embeddings, **kwargs
        )  # fmt: skip

    def _decode(self, inputs_embeds, tokenizer, attention_mask, decode_text=False, **kwargs):
        return self.llm.generate(
            inputs_embeds=inputs_embeds, pad_token_id=0, attention_mask=attention_mask, **kwargs
        )  # fmt: skip

    def generate(
        self, input_ids=None, pixel_values=None, tgt_sizes=None, image_bound=None, attention_mask=None, tokenizer=None,
        vision_hidden_states=None, return_vision_hidden_states=False, stream=False, decode_text=False, **kwargs,
    ):  # fmt: skip
        data = {"input_ids": input_ids, "image_bound": image_bound}
        if vision_hidden_states is None:
            data |= {"pixel_values": pixel_values, "tgt_sizes": tgt_sizes}
        else:
            data["vision_hidden_states"] = vision_hidden_states
        with torch.inference_mode():
            embeddings, states = self.get_vllm_embedding(data)
            result = self._decode(embeddings, tokenizer, attention_mask, decode_text=decode_text, **kwargs)
        return (result, states) if return_vision_hidden_states else result

    def chat(self, image=None, msgs=None, tokenizer=None, processor=None, max_slice_nums=None, **kwargs):
        """msgs: a message, or a list of messages for a batch; the answers are ids."""
        inputs = processor(msgs if isinstance(msgs[0], list) else [msgs], max_slice_nums=max_slice_nums)
        return self.generate(**inputs, tokenizer=tokenizer, **kwargs)


def minicpm_v(num_layers=5):
    return seeded(MiniCPMV(text_config(MiniCPMVConfig, num_layers)))


QUERIES = 4  # tokens of a unit in most tests; the real model has 64
IM_START, IM_END, SLICE_START, SLICE_END, NEWLINE, UNKNOWN = 140, 141, 142, 143, 9, 0


class Processor:
    """Turns messages, lists of words (ids) and images [units, patches, 3], into what the model takes.

    Args:
        image_id: whether each image has a number before it.
        side: where it pads; the real one does on the left.
    """

    def __init__(self, image_id=False, side="left"):
        self.image_id, self.side = image_id, side

    def __call__(self, messages, max_slice_nums=None):
        rows = [self.row(message) for message in messages]
        length = max(len(ids) for ids, _, _ in rows)
        shift = [length - len(ids) if self.side == "left" else 0 for ids, _, _ in rows]
        ids = torch.zeros(len(rows), length, dtype=torch.int32)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for number, (by, (row, _, _)) in enumerate(zip(shift, rows, strict=True)):
            ids[number, by : by + len(row)], mask[number, by : by + len(row)] = torch.tensor(row), 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "image_bound": [
                torch.tensor(bounds, dtype=torch.int64).view(-1, 2) + by
                for by, (_, bounds, _) in zip(shift, rows, strict=True)
            ],
            "pixel_values": [pixels for _, _, pixels in rows],
            "tgt_sizes": [],
        }

    def row(self, message):
        ids, bounds, pixels, number = [5, 6], [], [], 0
        for part in message:
            if isinstance(part, int):
                ids.append(part)
                continue
            if ids[-1] in (IM_END, SLICE_END):
                ids.append(NEWLINE)
            if self.image_id:
                ids += [144, *(20 + int(digit) for digit in str(number)), 145]
            number += 1
            for index, unit in enumerate(part):
                ids.append(SLICE_START if index else IM_START)
                bounds.append([len(ids), len(ids) + len(unit)])
                ids += [UNKNOWN] * len(unit) + [SLICE_END if index else IM_END]
                pixels.append(unit)
        return ids, bounds, pixels


# ---- InternVL2.5


class InternVLChatConfig(Qwen2Config):
    model_type = "internvl_chat"


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"

    def __init__(self, config, num_layers=5):
        super().__init__(config)
        self.num_image_token = 4
        self.language_model = Qwen2ForCausalLM(text_config(num_layers=num_layers))
        self.vision_model = nn.Linear(3, WIDTH, bias=False)
        self.img_context_token_id = None

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def extract_feature(self, pixel_values):
        return self.vision_model(pixel_values)

    def forward(
        self, pixel_values, input_ids=None, attention_mask=None, position_ids=None, image_flags=None,
        past_key_values=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
        return_dict=None,
    ):  # fmt: skip
        embeddings = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)[image_flags.squeeze(-1) == 1]
        batch, length, width = embeddings.shape
        embeddings = embeddings.reshape(batch * length, width)
        selected = input_ids.reshape(-1) == self.img_context_token_id
        embeddings[selected] = embeddings[selected] * 0.0 + features.reshape(-1, width)
        arguments = {} if past_key_values is None else {CACHE: past_key_values}
        outputs = self.language_model(
            inputs_embeds=embeddings.reshape(batch, length, width), attention_mask=attention_mask,
            position_ids=position_ids, use_cache=use_cache, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, **arguments,
        )  # fmt: skip
        if labels is not None:
            logits = outputs.logits[:, :-1].flatten(0, 1)
            outputs.loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return outputs

    def chat(self, tokenizer, pixel_values, question, generation_config, num_patches_list=None):
        """question: ids with 149 for each image; the answers are ids."""
        self.img_context_token_id = tokenizer
        ids = self.query(question, num_patches_list or [len(pixel_values)])
        ids = torch.tensor([ids])
        return self.generate(
            pixel_values=pixel_values, input_ids=ids, attention_mask=torch.ones_like(ids), **generation_config
        )

    def batch_chat(self, tokenizer, pixel_values, questions, generation_config, counts):
        """counts: numbers of tiles of the images of each question."""
        self.img_context_token_id = tokenizer
        rows = [self.query(question, own) for question, own in zip(questions, counts, strict=True)]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return self.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=mask, **generation_config)

    def query(self, question, counts):
        ids, left = [], iter(counts)
        for word in question:
            ids += [152, *[151] * (self.num_image_token * next(left)), 153] if word == 149 else [word]
        return ids

    @torch.no_grad()
    def generate(
        self, pixel_values=None, input_ids=None, attention_mask=None, visual_features=None, generation_config=None,
        output_hidden_states=None, **generate_kwargs,
    ):  # fmt: skip
        assert self.img_context_token_id is not None
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.extract_feature(pixel_values) if visual_features is None else visual_features
            batch, length, width = embeddings.shape
            embeddings = embeddings.reshape(batch * length, width)
            selected = input_ids.reshape(-1) == self.img_context_token_id
            assert selected.sum() != 0
            embeddings[selected] = features.reshape(-1, width)
            embeddings = embeddings.reshape(batch, length, width)
        return self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=attention_mask, generation_config=generation_config,
            output_hidden_states=output_hidden_states, use_cache=True, **generate_kwargs,
        )  # fmt: skip


def internvl_chat(num_layers=5):
    return seeded(InternVLChatModel(InternVLChatConfig(**TEXT), num_layers))
