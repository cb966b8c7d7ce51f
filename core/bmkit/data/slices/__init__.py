"""Time-division multiplexing: two speakers' words as slices of time, and slices as tokens."""
