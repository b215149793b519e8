"""Patches of third-party libraries."""
