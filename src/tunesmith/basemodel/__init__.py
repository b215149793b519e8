"""Base models: catalogue, download, verification and store. Both halves; Python 3.10."""
