"""What each frame of a video has to do with a question, by SigLIP: scores for fftriton.KVTP."""

from .fusion import ContextFusion
from .siglip import BoundRelevance, SiglipRelevance, load_relevance

__all__ = ["BoundRelevance", "ContextFusion", "SiglipRelevance", "load_relevance"]
