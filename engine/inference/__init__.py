"""What a trained side network is for: text, conversations, held-out loss."""
