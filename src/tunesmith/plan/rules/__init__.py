"""What LLaMA-Factory would say about a config after minutes, said in milliseconds."""
