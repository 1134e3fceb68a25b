"""Revisions, one file each, named by their order."""
