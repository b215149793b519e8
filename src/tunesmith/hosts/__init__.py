"""Rented hosts: where they are, who they are (host keys), and a shell on them."""
