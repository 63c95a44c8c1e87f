"""The package `bench` of the checkout, for the tests: the root, where it stands, is not on their path."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "bench")]
