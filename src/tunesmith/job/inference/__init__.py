"""Inference with a loaded model, and the validation rows for it."""
