"""Sequences, scheduler, prefix cache, the engine thread: token ids in, token events out; knows no text, no HTTP."""
