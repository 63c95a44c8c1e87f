"""`python -m fftriton`: the command line."""

from .app.cli import app

app()
