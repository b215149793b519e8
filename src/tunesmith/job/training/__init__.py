"""The train phase, and what makes it start and step faster."""
