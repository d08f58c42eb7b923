"""Readers, cleaning, splits and the synthetic shop: from anybody's files to genrec's tables."""
