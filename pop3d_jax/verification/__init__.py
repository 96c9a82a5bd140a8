"""Comparisons of the package with numbers of the official implementations (golden sets), by family.

`families.FAMILIES` lists them; `python -m pop3d_jax.verify` runs them. Every size, setting and array name is read from
the golden files, so that any set of the same format will do.
"""
