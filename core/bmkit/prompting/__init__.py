"""Templates, verbalizers and scoring, for `prompt` and for `infer` on what it makes."""
