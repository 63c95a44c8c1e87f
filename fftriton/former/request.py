"""Moved to fftriton.app.request."""

from fftriton import former

former.moved(__name__, "fftriton.app.request")
