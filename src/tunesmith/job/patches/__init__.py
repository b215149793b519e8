"""Every patch of a library, by library (tunesmith.patching says what a patch is)."""
