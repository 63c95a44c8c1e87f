"""The needle task: a handwritten digit appears for a moment in a video; which, when, where, how many?

Needs scikit-learn for its digits.
"""

from .samples import HARDER_SPLITS, KINDS, SPLITS, Sample, generate_sample, write_clip

__all__ = ["HARDER_SPLITS", "KINDS", "SPLITS", "Sample", "generate_sample", "write_clip"]
