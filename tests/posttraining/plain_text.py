"""A reward that random weights earn about half of the time, so that there is something to learn."""


def reward(answers):
    """1 for each answer that begins with a character of ASCII."""
    return [float(one.text[:1].isascii()) for one in answers]
