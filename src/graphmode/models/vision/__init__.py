"""Vision towers, and the positions of images in a prompt."""
