"""Block tables over one pool of KV blocks: allocation, prefix sharing, copy-on-write."""
