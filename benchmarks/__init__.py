"""Benchmarks. Most are scripts, `python benchmarks/NAME.py`; `accelerator` is a package."""
