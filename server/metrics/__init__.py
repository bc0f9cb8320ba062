"""The page /metrics, and how the answers end that it counts.

Reading order:

    metrics        the metrics themselves, under vLLM's names
    families       gauges, counters and histograms with the server's prefix and labels
    histograms     their buckets, and a histogram that is cheap enough for every token
    tier_metrics   where evicted KV blocks go
    metrics_sum    the sum over the processes of a server
    answer_end     the status of an answer, and whether its client has left

May import the server's ground modules, engine.process and the engine's words.
"""
