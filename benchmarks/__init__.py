"""What we do against what the user would do otherwise; `make bench` runs it (README.md here)."""
