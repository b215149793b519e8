"""configs/stack.yml, and the training environment built from it."""
