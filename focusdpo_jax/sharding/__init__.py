"""The device mesh, sharding rules, and multi-process runs."""
