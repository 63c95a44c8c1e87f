"""Moved to fftriton.runtime.processing."""

from fftriton import former

former.moved(__name__, "fftriton.runtime.processing")
