"""What a caption is worth: array programs beside the model, and judges of what it states."""
