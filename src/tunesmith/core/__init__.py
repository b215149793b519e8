"""Shared by all rooms: errors, files, archives, mirrors, processes. Python 3.10."""
