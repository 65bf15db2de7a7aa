"""Names for VMs that the user has not named: `brave-heron`."""

from __future__ import annotations

import random

_ADJECTIVES = """
able agile amber brave brief bright brisk broad calm clever cosy crisp curious deft eager early easy even fair fast
fine firm fond fresh gentle glad golden grand green happy hardy honest humble jolly keen kind light lively lucky
mellow merry mild modest neat nimble noble open patient plain polite prompt proud quick quiet rapid ready royal shy
silent silver simple sleek smart smooth snug sober solid steady still stout sunny swift tidy tiny vivid warm wise
witty young
"""
_NOUNS = """
acorn alder ant badger bay beaver bee birch bison brook canyon cedar cliff clover comet coral crane creek cricket
delta dune eagle elm falcon fern finch fjord forest fox garden gecko glade grove gull harbor hare hawk hazel heron
hill ibis island ivy jay koala lagoon lake lark lemur lily linden lotus lynx magpie maple marten meadow mole moose
moss newt oak ocean olive orchid osprey otter owl panda pebble pine plover pond poplar puffin quail rabbit raven reef
ridge river robin rook sage seal shore sparrow spruce stone stork swan swift thrush tiger toad trout tulip valley
walrus willow wolf wren
"""


def generated_name() -> str:
    """Returns a name of two words."""
    return f"{random.choice(_ADJECTIVES.split())}-{random.choice(_NOUNS.split())}"
