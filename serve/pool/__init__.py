"""The GPUs, and who has them."""
