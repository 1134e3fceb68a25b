"""The training loop: LoRA on a frozen base, packed batches, fused layers, checkpoints. torch lives here."""
