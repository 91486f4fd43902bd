"""Which blocks answer a prompt: from its tokens to one weight per task, and from there to the layers.

A router is a file here and a line in ``ROUTERS``; `SaptConfig.router` chooses among them.
"""

from .attention import AttentionRouter
from .ridge_router import RidgeRouter
from .router import Router

ROUTERS: dict[str, type[Router]] = {cls.kind: cls for cls in (AttentionRouter, RidgeRouter)}

__all__ = ["ROUTERS", "AttentionRouter", "RidgeRouter", "Router"]
