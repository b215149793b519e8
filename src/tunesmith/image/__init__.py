"""The container image: build it, ask it what it is, bring it elsewhere; and the engine."""
