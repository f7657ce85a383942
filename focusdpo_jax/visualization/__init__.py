"""Image grids, contact sheets and charts."""
