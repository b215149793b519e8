"""Chat templates: whether serving uses the same prompt as training."""
