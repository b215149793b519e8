"""Where runs live: one Protocol, and its implementations."""
