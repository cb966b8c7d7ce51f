"""What a recipe may say of each kind of step. No torch here."""
