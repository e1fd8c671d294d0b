"""Recovery methods, one file each, found by file name; see `base`."""
