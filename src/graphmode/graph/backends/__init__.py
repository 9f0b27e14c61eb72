"""The devices: one file each, behind the protocol of ``base``."""
