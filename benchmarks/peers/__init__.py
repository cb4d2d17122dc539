"""Other decoders of the same shape, each run in a process of its own, and the memory bandwidth that bounds them all.

``worker.py`` is a script for the peers' own environment and imports nothing of this package.
"""
