"""Where video tokens stand in a sequence: what to give as `layout` to `fftriton.reduce`.

Layouts of the supported Hugging Face families are found by themselves (families.py). For models loaded by remote code
each function here takes what the model's own pipeline makes of a prompt and returns a list of VideoLayout
(remote_code.py).
"""

from .layout import VideoLayout
from .remote_code import evenly_spaced, frames_of_runs, internvl_chat, llava_video, minicpm_v, nvila

__all__ = ["VideoLayout", "evenly_spaced", "frames_of_runs", "internvl_chat", "llava_video", "minicpm_v", "nvila"]
