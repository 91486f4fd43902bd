"""What can be done with a pool: its tasks' life cycle, warm starts, exchange with plain adapters, saving, loading."""
