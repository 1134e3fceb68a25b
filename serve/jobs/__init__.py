"""The queue of fine-tuning jobs: their order, the GPUs they get, the trainers that run them, and the hand-over."""
