"""Arrays in, numbers out: metrics, intervals, tests and error analysis."""
