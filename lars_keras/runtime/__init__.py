"""Callbacks that keep a run alive: checkpoints, recovery, divergence, preemption, unreadable images."""
