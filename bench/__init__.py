"""Through a base URL into figures: how often models answer as the reference does, stop by themselves, and how fast.

Knows endpoints only by HTTP, so that what it measures is what every client gets. Imports nothing but `clients`.
"""
