"""A stand-in for a machine with hardly any free memory: what a micro-batch is measured against."""

from tunesmith.job.system import resources

resources.memory_available = lambda: 1
