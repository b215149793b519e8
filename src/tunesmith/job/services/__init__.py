"""A target's web services, on its loopback."""
