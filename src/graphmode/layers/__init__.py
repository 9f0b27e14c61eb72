"""The layers of a decoder, made of the operations in `graphmode.ops`."""
