"""Devices: what a machine is, found out on the machine itself."""
