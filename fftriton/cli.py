"""The former location of the command line; use `python -m fftriton`. It will be removed after one more release."""

import warnings

from .app.cli import app

warnings.warn("fftriton.cli is now fftriton.app.cli; run `python -m fftriton`", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    app()
