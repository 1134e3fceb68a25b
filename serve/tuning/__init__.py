"""Configurations of vLLM's LoRA kernels for the GPU at hand, found by trying and kept."""
