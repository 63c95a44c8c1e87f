"""Moved to fftriton.runtime.checkpoints."""

from fftriton import former

former.moved(__name__, "fftriton.runtime.checkpoints")
