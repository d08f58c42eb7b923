"""Constrained beam decoding: the trie, the one search, and the engines that feed it."""
