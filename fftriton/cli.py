"""The former place of the command line, for one more release: `python -m fftriton`."""

import warnings

from .app.cli import app

warnings.warn("fftriton.cli is now fftriton.app.cli; run `python -m fftriton`", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    app()
