"""Speed benchmarks: what a step costs here, beside what a user would otherwise run. `python -m benchmarks.speed`."""
