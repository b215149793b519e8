"""A run folder: its files, states, limits, queue, checkpoints, failures. Standard library."""
