"""Baselines and comparison of recommendation lists."""
