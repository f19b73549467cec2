"""What a run shows: log, progress, layers, report."""
