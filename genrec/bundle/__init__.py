"""Portable bundles: everything that serving a run needs, in one folder that can be verified."""
