"""Networks as Flax Linen modules: pure functions of explicit parameter trees, NHWC."""
