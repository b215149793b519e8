"""Merging adapter and base model block by block, with the bytes of LLaMA-Factory's export."""
