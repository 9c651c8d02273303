"""The MMedExpert builder: public questions in, filtered step-by-step traces with a datasheet out."""
