"""Allocators: how much every axis loses, one file each."""
