"""Where do the product and this package lie, and how does a process of the tests import both?"""

from __future__ import annotations

import os
import pathlib

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
PYTHON_FOLDER = CHECKOUT / "python"
# The product, standing alone, and this package.
PYTHONPATH = f"{PYTHON_FOLDER}{os.pathsep}{CHECKOUT / 'test'}"
