"""jobrunner: fault-tolerant batch jobs, complete and written exactly once."""
