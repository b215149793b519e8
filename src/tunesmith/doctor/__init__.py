"""Look at a host before anything is paid for or changed: probe, judge, decide."""
