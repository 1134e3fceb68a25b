"""From rows and a base model to an adapter folder with a manifest.

torch, transformers and peft are imported inside the functions that need them: reading a manifest or a run
configuration costs milliseconds.
"""
