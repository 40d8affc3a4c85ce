"""The bench uses our code and what the tests use: both are on the path as soon as one of its modules is imported."""

import pathlib
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT / folder) for folder in ("python", "tools", "test")]
