"""`loraport bench train`: training speed and memory of ours and its peers, each run in a process of its own."""
