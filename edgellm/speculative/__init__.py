"""Speculative decoding: what proposes an answer's next tokens, in whatever vocabulary, and when that pays."""
