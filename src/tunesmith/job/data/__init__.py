"""Data and config keys, as LLaMA-Factory's own code sees them."""
