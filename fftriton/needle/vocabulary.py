"""The tokens of the needle models; the index of a token in TOKENS is its id.

The model for the harder splits knows HARDER_TOKENS, which begin with TOKENS.

Two tokens have Qwen2-VL's names because Hugging Face's processor looks for them.
"""

COLOURS = ("red", "green", "blue", "yellow")
DIGITS = tuple("0123456789")
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("zero", "one", "two", "three", "four")
KIND_WORDS = ("what", "when", "where", "count", "whichcolour")

PAD, BOS, SYSTEM, VISION_START, VISION_END = "<pad>", "<bos>", "<sys>", "<|vision_start|>", "<|vision_end|>"
QUESTION, EOS, IMAGE, VIDEO, UNKNOWN = "<q>", "<eos>", "<|image_pad|>", "<|video_pad|>", "<unk>"
SPECIAL = (PAD, BOS, SYSTEM, VISION_START, VISION_END, QUESTION, EOS, IMAGE, VIDEO)

TOKENS = (*SPECIAL, *DIGITS, *COLOURS, *QUARTERS, *QUADRANTS, *COUNTS, *KIND_WORDS, "all", UNKNOWN)
IDS = {token: i for i, token in enumerate(TOKENS)}

HARDER_TOKENS = (*TOKENS, "after", "same", "yes", "no")
HARDER_IDS = {token: i for i, token in enumerate(HARDER_TOKENS)}
