"""Lists for many users: jobs in shards, users from tables, parts, Ray."""
