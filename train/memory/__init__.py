"""What a training run will need, from the base's config alone: memory by part, speed, cost, and what fits."""
