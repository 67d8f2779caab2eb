"""Datasets behind a URL: fetched ahead of the reader into a cache that a node shares, or read by ranges."""
