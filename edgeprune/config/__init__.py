"""Targets, profiles and the budget they resolve to. Data files in, records out."""
