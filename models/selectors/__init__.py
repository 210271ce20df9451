"""Rules that pick image tokens, one small file per method, behind one interface."""
