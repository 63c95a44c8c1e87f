"""Moved to fftriton.layouts.layout."""

from fftriton import former

former.moved(__name__, "fftriton.layouts.layout")
