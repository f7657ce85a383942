"""Benchmarks, scorers, statistics and reports of generated images."""
