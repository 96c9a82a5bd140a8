"""Matplotlib without a display; whoever draws imports this before anything else of matplotlib.

Commands started from a notebook inherit MPLBACKEND, the backend of the notebook's kernel. Where that package is not
installed, matplotlib cannot even be imported, so the variable is set before, for this process and those it starts.
"""

import os

os.environ["MPLBACKEND"] = "Agg"

import matplotlib

matplotlib.use("Agg")  # matplotlib may have been imported before, with another backend

from matplotlib import pyplot as plt

__all__ = ["matplotlib", "plt"]
