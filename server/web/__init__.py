"""Static pages that the server answers with: `docs.html` is the page of /docs.

The page reads openapi.json and loads nothing from elsewhere. There is no Python here.
"""
