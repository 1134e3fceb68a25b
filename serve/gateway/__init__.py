"""The gateway: the one open port, in front of an engine that listens on loopback or a Unix socket alone. See app.py."""
