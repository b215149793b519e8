"""The train phase, and what makes its start and its steps faster."""
