"""Exported feature grids: what is stored of a key frame, how features are written down, how they are searched."""
