"""Built once, before the processes that save them are forked: states, and what drawing a card's picture imports."""

from matplotlib.backends import backend_agg

from helpers.killed_worker import fresh_base, state

READY = (backend_agg, state(0), state(1), fresh_base())
