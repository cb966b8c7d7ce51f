"""The prompt engine: templates and verbalizers on a model, calibrated, kept, and asked."""
