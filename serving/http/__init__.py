"""The front of the engine: the OpenAI API over HTTP, keys, logs, metrics and a page."""
