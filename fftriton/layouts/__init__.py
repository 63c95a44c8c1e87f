"""Positions of video tokens in a sequence: what `fftriton.reduce` takes as `layout`.

Layouts of the supported Hugging Face families are detected automatically (families.py), and so are those of some models
loaded by remote code (fftriton.hf.remote_code). For what calls the language model of such a model itself, the functions
here compute a list of VideoLayout from the outputs of the model's own preprocessing (remote_code.py, expansion.py).
"""

from .layout import VideoLayout
from .remote_code import evenly_spaced, frames_of_runs, internvl_chat, llava_side, llava_video, minicpm_v, nvila

__all__ = [
    "VideoLayout",
    "evenly_spaced",
    "frames_of_runs",
    "internvl_chat",
    "llava_side",
    "llava_video",
    "minicpm_v",
    "nvila",
]
