"""Adapters of a running engine: what can be served, under which names, loaded and replaced while requests run."""
