"""Attackers: each module acts as one, and the tests show what the attacker does not get."""
