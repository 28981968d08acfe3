"""Models behind an endpoint that speaks the OpenAI chat protocol: asked by rewards, evaluation and curation alike."""
