"""Log, progress bar, layer telemetry and report of a run."""
