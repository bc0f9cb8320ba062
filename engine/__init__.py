"""Everything between a tokenised request and a sampled token. Needs no HTTP package."""
