"""The stages of MMedExpert-R1: each a resumable unit that writes only inside its run folder."""
