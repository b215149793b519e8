"""The machine below a run: memory, processors, GPUs, versions."""
