"""Templates: a row of data -> a prompt with places to fill in -> token ids, each with its role."""
