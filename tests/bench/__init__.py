"""Measures the daemon against a bare baseline in the same run. `python -m tests.bench --help`."""
