"""RMS norms, alone and with the sum before them."""
