"""From raw videos to training data: visual and audio captions, their fusion, filters, and references."""
