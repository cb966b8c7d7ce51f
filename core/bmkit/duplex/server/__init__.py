"""Duplex sessions over a WebSocket: what is said, who may come in, one loop for each session."""
