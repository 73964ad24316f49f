"""Reading without end: streams of text, and memories of what was read."""
