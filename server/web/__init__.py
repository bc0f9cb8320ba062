"""Static files that the server answers with: `docs.html` is the page of /docs, the others that of /.

Neither loads anything from elsewhere. There is no Python here, and nothing to build.
"""
