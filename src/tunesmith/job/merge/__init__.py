"""Adapter and base model made one, block by block, with the bytes of the export."""
