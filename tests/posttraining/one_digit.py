"""A reward for one digit and nothing after it, whichever digit it is."""


def reward(answers):
    """1 for each answer that is a digit and has ended, half for one that begins with a digit."""
    return [
        1.0 if not one.truncated and len(one.text) == 1 and one.text.isdigit()
        else 0.5 * one.text[:1].isdigit()
        for one in answers
    ]  # fmt: skip
