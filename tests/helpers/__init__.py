"""What several test files build with: tiny models, pools, streams, servers, workers. Imports no test file."""

from peft_sapt.routing import ROUTERS

from .centroid_router import CentroidRouter

ROUTERS[CentroidRouter.kind] = CentroidRouter
