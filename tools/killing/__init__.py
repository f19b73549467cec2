"""Runs of train.py that are killed: their processes, the moments, and the check of their files."""
