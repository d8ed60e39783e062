"""The OpenAI-compatible protocol, shared by the HTTP server and by batch files."""
