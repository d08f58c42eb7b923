"""Task families: instruction rows (prompt, completion, target, row id)."""
