"""The report of a run: curve, diagnosis, before/after, one HTML page (control half).

Nothing is imported here, so that `inv --list` does not pay for matplotlib:
import `tunesmith.report.page` or `tunesmith.report.terminal` where they are used.
"""
