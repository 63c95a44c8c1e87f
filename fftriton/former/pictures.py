"""Moved to fftriton.app.pictures."""

from fftriton import former

former.moved(__name__, "fftriton.app.pictures")
