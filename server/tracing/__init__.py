"""OpenTelemetry traces: one span for each request, with its queue, prefill and decode as children.

Reading order:

    current       the trace of the present request, through which a generation reports itself
    middleware    begins a request's trace and ends it with the answer
    attributes    names of attributes and operations, and the attributes of a finished generation
    spans         the spans themselves; the only module that imports OpenTelemetry
    start         the tracer that the settings ask for, if they ask for one

Without `--otlp-traces-endpoint` nothing of this runs and OpenTelemetry is not imported. Spans hold
counts, times, names and error codes; they never hold prompts, answers or keys.

May import metrics, the server's ground modules and the engine's words.
"""
