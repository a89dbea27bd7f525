"""The prompt guard: text in, verdict out; it knows neither models nor HTTP.

So far it reads: what a text says beneath its disguises, in which windows, and what of a conversation counts. The
classifier is to come.
"""
