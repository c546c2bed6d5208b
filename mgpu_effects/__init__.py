"""The runtime: carries out what the scheduler decides, and reports what came of it."""
