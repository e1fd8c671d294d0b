"""HyWIA: the name that later versions of adaptive fusion go by; the same metric."""

from __future__ import annotations

import dataclasses

from edgeprune.metrics import adaptive_fusion

METRIC = dataclasses.replace(adaptive_fusion.METRIC, name="hywia", summary="another name of adaptive-fusion")
