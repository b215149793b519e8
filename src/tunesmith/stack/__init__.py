"""configs/stack.yml, and the training environment that is made of it."""
