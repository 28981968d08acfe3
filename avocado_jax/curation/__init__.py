"""From raw videos to training captions: seen, heard, woven into one, filtered, and taken apart into references."""
