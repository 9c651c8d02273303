"""Rewards that give answers of a few tokens something to learn from."""


def by_place(completions, **columns):
    """Different values for the completions of one question, whatever they say."""
    return [place * 7 % 5 / 4 for place, _ in enumerate(completions)]
