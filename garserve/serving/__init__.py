"""The HTTP server: OpenAI's API with regions, and the page to try it (floor 6)."""
