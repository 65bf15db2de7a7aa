"""What the daemon costs, as ratios to the bare thing beside it in the same run. `python -m tests.bench --help`."""
