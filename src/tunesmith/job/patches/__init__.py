"""What is changed in libraries that are not ours."""
