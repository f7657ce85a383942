"""Meshes of devices, the shardings of parameters and activations, and runs of several processes."""
