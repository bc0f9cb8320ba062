"""Scores of texts: how relevant documents are to a query, and which class a text belongs to.

Reading order:

    rerank      POST /v1/rerank and /v1/score
    classify    POST /v1/classify
    scores      what they share: one pass over each prompt, and scores of its end
    pairs       a query and a document as one prompt

May import `api`, `requests`, `http`, `text`, the server's ground modules, and the engine's words.
"""
