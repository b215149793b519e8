"""Evaluation before and after a training; predictions; chat in a terminal."""
