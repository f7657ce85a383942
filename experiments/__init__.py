"""Experiments that measure the quality of the method. Each script documents its command line."""
