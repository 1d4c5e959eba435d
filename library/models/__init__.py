"""Denoisers that diffusers lacks, or whose forward pass a trainer cannot use as it is: its blocks, wired up here."""
