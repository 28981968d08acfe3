"""An OpenAI-compatible HTTP server over the captioning engine."""
