"""How relevant each frame of a video is to a question, according to SigLIP: scores for fftriton.KVTP."""

from .bound import BoundRelevance, Encoded
from .fusion import ContextFusion
from .patches import Patches
from .siglip import SiglipRelevance, load_relevance

__all__ = ["BoundRelevance", "ContextFusion", "Encoded", "Patches", "SiglipRelevance", "load_relevance"]
