"""What a run reads and passes on: the model, the text, hidden states."""
