"""Any model of transformers on placed weights: packed, resident or streamed, its code untouched."""
