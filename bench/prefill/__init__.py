"""Whole prefills of random Qwen2 decoders, dense and reduced, against what their operations predict."""
