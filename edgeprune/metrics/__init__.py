"""Importance metrics: one file per metric, exposing `METRIC`."""
