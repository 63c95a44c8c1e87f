"""How relevant each frame of a video is to a question, according to SigLIP: scores for fftriton.KVTP."""

from .fusion import ContextFusion
from .siglip import BoundRelevance, SiglipRelevance, load_relevance

__all__ = ["BoundRelevance", "ContextFusion", "SiglipRelevance", "load_relevance"]
