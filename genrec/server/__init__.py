"""HTTP server: a run behind ``/recommend``, batched as requests come, swapped while it serves."""
