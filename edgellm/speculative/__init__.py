"""Speculative decoding: who drafts tokens, how many of them a step should verify, and what that learns from use."""
