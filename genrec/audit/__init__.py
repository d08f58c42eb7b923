"""Audit records: written, chained, verified, replayed and shown."""
