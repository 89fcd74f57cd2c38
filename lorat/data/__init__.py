"""Everything up to the batch: datasets as published, shards, pairs; no torch."""
