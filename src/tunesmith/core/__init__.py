"""What every room may use: errors, files, archives, mirrors, processes. Python 3.10."""
