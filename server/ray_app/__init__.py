"""`quire deploy`: fronts and engines on the machines of a Ray cluster, under Ray Serve.

Ray places, restarts, scales and drains them, and says which engines there are. Tokens never pass
through Ray: they go between fronts and engines over quire's own links.

    options        what is deployed: how many of what, as flags and as the application's arguments
    policy         how many engines there should be, from their loads
    engine_owner   one engine's process, as its actor owns it
    serve_engines  a front's directory: which engines there are now, and the links to them
    application    all of it as a Serve application
    command        `quire deploy`

It may import server.serving and all that that imports, engine.fleet and engine.network. Only
`application` and `command` import Ray, which is the extra `quire-server[ray]`.
"""
