"""`volar`, the command line of the daemon."""
