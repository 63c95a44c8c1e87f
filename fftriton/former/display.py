"""Moved to fftriton.app.display."""

from fftriton import former

former.moved(__name__, "fftriton.app.display")
