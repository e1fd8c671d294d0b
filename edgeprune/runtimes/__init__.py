"""Runtimes that run an exported artifact: one file each, exposing RUNTIME."""
