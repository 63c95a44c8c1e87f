"""Moved to fftriton.runtime.video."""

from fftriton import former

former.moved(__name__, "fftriton.runtime.video")
