"""LLaMA Board, API and TensorBoard of a target, and the tunnel to them."""
