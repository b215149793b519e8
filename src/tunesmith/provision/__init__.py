"""Make a host a training machine, and see whether it still is one."""
