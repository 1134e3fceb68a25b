"""The benches of serving: `loraport bench throughput`, `lora-tax`, `gateway`, `startup`, and what they need made."""
