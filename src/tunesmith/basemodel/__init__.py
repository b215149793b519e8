"""Base models: which there are, fetch, prove and keep them. Both halves; Python 3.10."""
