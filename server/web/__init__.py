"""Static files: `docs.html` is the page of /docs, the others that of / (see server/live).

Neither loads anything from elsewhere. There is no Python here, and nothing to build.
"""
