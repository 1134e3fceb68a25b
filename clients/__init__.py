"""The wire: errors that everyone raises, where things lie, typed calls to an endpoint, launchers for tools.

Imports nothing else of Loraport; every other room may import it.
"""
