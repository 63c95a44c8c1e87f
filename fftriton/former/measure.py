"""Moved to fftriton.runtime.measure."""

from fftriton import former

former.moved(__name__, "fftriton.runtime.measure")
