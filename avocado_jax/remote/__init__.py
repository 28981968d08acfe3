"""The client of OpenAI-compatible endpoints that rewards, evaluation and curation share."""
