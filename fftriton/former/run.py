"""Moved to fftriton.app.run."""

from fftriton import former

former.moved(__name__, "fftriton.app.run")
