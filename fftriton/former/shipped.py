"""Moved to fftriton.runtime.shipped."""

from fftriton import former

former.moved(__name__, "fftriton.runtime.shipped")
