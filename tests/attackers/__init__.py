"""Attackers: each module plays one, and the tests beside them show what the attacker does not get."""
