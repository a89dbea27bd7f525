"""Wire types: what JSON bodies look like, one file an endpoint family. JSON stops here; the rest is typed."""
