"""Elementwise work of a training step in one pass each: Triton kernels on NVIDIA GPUs, plain torch elsewhere."""
