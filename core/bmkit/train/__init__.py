"""Training, shared by the engines: one trainer on transformers.Trainer."""
