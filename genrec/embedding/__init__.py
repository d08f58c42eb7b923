"""Item vectors: one float32 row per catalogue row."""
