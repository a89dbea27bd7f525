"""Chat templates, tool calls, JSON schemas as grammars, text assembly: pure pieces between messages and tokens."""
