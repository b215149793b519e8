"""From a config and what was asked to a plan of a run: read, check, decide; starts nothing."""
