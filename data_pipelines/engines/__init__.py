"""Where `build_shard` runs."""
