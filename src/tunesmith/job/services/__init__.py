"""The web services of a target, on its loopback."""
