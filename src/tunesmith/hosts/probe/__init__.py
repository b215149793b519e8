"""What a host is and has: one shell script, asked for the sections that a caller needs.

`script.py` makes the script of the shell files here; `ask.py` sends it, in one SSH command, and
reads what comes; each section is a frozen dataclass that says what its values may be. Who looks
at a host (host.check, provisioning, drift, layout, containers) does it by these.
"""
