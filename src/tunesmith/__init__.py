"""tunesmith: from a GPU machine that answers SSH to a proven fine-tuned model."""

__version__ = "0.1.0"
