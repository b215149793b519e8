"""Owns a run: starts, restarts and stops its phases, and answers clients' requests."""
