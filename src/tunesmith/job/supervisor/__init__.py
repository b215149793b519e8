"""Owns a run: starts, restarts and stops its phases; answers clients about it."""
