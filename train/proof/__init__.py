"""What the trained adapter does: golden replies, generation on held-out rows, the report, the gate."""
