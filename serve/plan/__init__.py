"""What to ask of the engine, from config.json and the adapters' manifests alone."""
