"""Measured evidence and the chains that are built on it."""
