"""A model that listens while it speaks: its data, its sessions, how well it takes turns."""
