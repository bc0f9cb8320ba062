"""HTTP itself: connections, bodies, keys, limits, event streams. Knows no model and no API.

Reading order:

    http_protocol      the connection: slow senders, too many headers
    middleware         layers around every route: request id, body limit, HTTP metrics
    auth, body         API keys; strict JSON
    content_encoding   compressed bodies
    limits             the queue limits, charged when a request arrives
    route_docs         what routes state for the OpenAPI document
    outbox, sse        server-sent events: producer, connection, clients that leave
    event_log, resumption, responses_store    streams and responses that are kept for later
    worker_link, siblings                     several HTTP processes

May import tenants, metrics, the ground (server/*.py), and of the engine its words and
`engine.process`.
"""
