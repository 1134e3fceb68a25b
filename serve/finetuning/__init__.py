"""OpenAI's fine-tuning API on the gateway: files, uploads, jobs, events, checkpoints, permissions."""
