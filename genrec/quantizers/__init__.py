"""Quantizers: item vectors to codes, and the resolution of shared codes."""
