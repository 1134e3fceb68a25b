"""`loraport jobs`: what the API offers, at the terminal."""
