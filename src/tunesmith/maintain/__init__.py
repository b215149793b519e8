"""What is rendered from configs/ into files of the repository, and checked for drift."""
