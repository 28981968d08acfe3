"""What a checkpoint can do: captions of clips, and measures of them."""
