"""Load on an OpenAI-compatible server, in processes of its own: requests, their timelines, and what they mean."""
