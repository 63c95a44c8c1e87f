"""Moved to fftriton.runtime.files."""

from fftriton import former

former.moved(__name__, "fftriton.runtime.files")
