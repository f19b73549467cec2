"""Runs of train.py that are killed: their processes, the moments, and the look at what they leave."""
