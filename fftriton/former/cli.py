"""Moved to fftriton.app.cli; `python -m fftriton` runs it."""

from fftriton import former
from fftriton.app.cli import app

if __name__ == "__main__":
    app()

former.moved(__name__, "fftriton.app.cli")
