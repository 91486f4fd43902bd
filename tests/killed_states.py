"""Built once, before the processes that save them are forked: states, and what drawing a card's picture imports."""

from killed_worker import fresh_base, state
from matplotlib.backends import backend_agg

READY = (backend_agg, state(0), state(1), fresh_base())
