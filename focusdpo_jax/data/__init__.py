"""Preference records: their fields and checks, their sources, and the loader that batches them."""
