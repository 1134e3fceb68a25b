"""Peers that `loraport bench` measures ours against: programs of their own, imported by nothing."""
