"""A target's LLaMA Board, API and TensorBoard, and the tunnel to them."""
