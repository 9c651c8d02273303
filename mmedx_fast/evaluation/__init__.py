"""Asking a model the questions of a data set, of any size: how they are asked, what is written down, what is
counted. Knows engines and prompts, no stages."""
