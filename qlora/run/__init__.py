"""The run folder: locking, checkpoints, resume, metrics, signals."""
