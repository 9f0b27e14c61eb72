"""The server: OpenAI's API over HTTP in one process, the engine in another."""
