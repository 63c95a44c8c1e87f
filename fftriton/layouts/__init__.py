"""Positions of video tokens in a sequence: what `fftriton.reduce` takes as `layout`.

Layouts of the supported Hugging Face families are detected automatically (families.py). For models loaded by remote
code, the functions here compute a list of VideoLayout from the outputs of the model's own preprocessing
(remote_code.py).
"""

from .layout import VideoLayout
from .remote_code import evenly_spaced, frames_of_runs, internvl_chat, llava_video, minicpm_v, nvila

__all__ = ["VideoLayout", "evenly_spaced", "frames_of_runs", "internvl_chat", "llava_video", "minicpm_v", "nvila"]
