"""Who runs trainers: this machine, or a cluster."""
