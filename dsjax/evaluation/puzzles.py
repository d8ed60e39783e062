"""Famous puzzles, altered: whoever answers from memory is wrong. All of them are ours.

In the manner of the collection "Misguided Attention": a small change makes the famous answer false,
and as a rule the true one obvious. Each has one answer, a number or one of the words it names.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dsjax.evaluation.task import Question, Task
from dsjax.evaluation.tasks_made import is_answer
from dsjax.rewards.extraction import final_words
from dsjax.rewards.notation import numeric, spell


class Puzzle(NamedTuple):
    """One puzzle. Without `words` its answer is a number."""

    name: str
    text: str
    answer: str
    words: tuple[str, ...] = ()


PUZZLES = (
    Puzzle(
        "glass-doors",
        "A game show has three doors, and all of them are clear glass. Behind door 1, which "
        "you have chosen, you see the car; behind doors 2 and 3 you see goats. The host opens "
        "door 3 and asks whether you want to change to door 2. Which door should you take to "
        "win the car?",
        "1",
    ),
    Puzzle(
        "farmer-and-sheep",
        "A farmer and his sheep stand on one side of a river. His boat holds one person and "
        "one animal. How many times must the boat cross the river until both are on the other "
        "side?",
        "1",
    ),
    Puzzle(
        "large-boat",
        "A farmer has a wolf, a goat and a cabbage. His boat holds him and all three of them "
        "at once. What is the least number of times that the boat crosses the river to bring "
        "everyone and everything over?",
        "1",
    ),
    Puzzle(
        "late-trolley",
        "A trolley rolls towards five people on the track, who have been dead for a day. You "
        "can divert it to another track, on which one living person is tied. Should you pull "
        "the lever to save lives?",
        "no",
        ("yes", "no"),
    ),
    Puzzle(
        "dead-cat",
        "A dead cat is put into a box together with a radioactive atom and a flask of poison "
        "that breaks if the atom decays, which has a chance of 50 percent within the hour. "
        "After an hour the box is opened. What is the probability, in percent, that the cat "
        "is alive?",
        "0",
    ),
    Puzzle(
        "labelled-doors",
        "Two doors, and two guards, of whom one always lies. On the left door a sign says "
        "that it leads to freedom, and you know for certain that the sign is true. What is "
        "the least number of questions that you must ask the guards to find the door to "
        "freedom?",
        "0",
    ),
    Puzzle(
        "red-ball",
        "Of twelve balls eleven weigh the same, and the twelfth is heavier. The heavier one "
        "is painted red, the others are white, and you know this. What is the least number of "
        "weighings on a balance that you need to find the heavier ball?",
        "0",
    ),
    Puzzle(
        "glass-wall",
        "Three switches outside a room each control one of three lamps inside. The wall is of "
        "glass, so that you see all lamps from where the switches are. What is the least "
        "number of times that you must enter the room to find out which switch controls which "
        "lamp?",
        "0",
    ),
    Puzzle(
        "plain-bat",
        "A bat and a ball cost 110 cents together. The bat costs 100 cents. How many cents "
        "does the ball cost?",
        "10",
    ),
    Puzzle(
        "steady-lilies",
        "A patch of lilies on a lake grows by the same area every day. On day 0 there is "
        "none, and on day 48 it covers the lake. On which day did it cover half of the lake?",
        "24",
    ),
    Puzzle(
        "lonely-machine",
        "Five machines, each making its own widgets, make five widgets in five minutes. How "
        "many minutes does one machine need to make five widgets?",
        "25",
    ),
    Puzzle(
        "surgeon",
        "A boy is hurt in an accident and brought to the hospital. The surgeon, who is the "
        "boy's father, says: I cannot operate on him, he is my son. What is the surgeon to "
        "the boy?",
        "father",
        ("father", "mother"),
    ),
    Puzzle(
        "feathers",
        "Which is heavier: one kilogram of steel or two kilograms of feathers?",
        "feathers",
        ("steel", "feathers", "equal"),
    ),
    Puzzle(
        "full-jug",
        "You have a jug of 3 liters and a jug of 5 liters, and a tap. What is the least "
        "number of times that you fill a jug at the tap to have exactly 5 liters of water in "
        "one jug?",
        "1",
    ),
    Puzzle(
        "birthday-club",
        "All 23 members of a club were born on the first of May: that is what the club is "
        "for. What is the probability, in percent, that at least two of them have the same "
        "birthday?",
        "100",
    ),
    Puzzle(
        "sure-snail",
        "A snail is at the bottom of a well of 10 meters. It climbs 3 meters every day, and "
        "at night it stays exactly where it is. On which day does it reach the top, if the "
        "first day is day 1?",
        "4",
    ),
    Puzzle(
        "wide-bridge",
        "Four people want to cross a bridge at night. They need 1, 2, 5 and 10 minutes. They "
        "have one torch, and the bridge carries all four at once, walking together at the "
        "pace of the slowest. What is the least number of minutes until all are over?",
        "10",
    ),
    Puzzle(
        "lit-drawer",
        "A drawer holds 10 black and 10 blue socks. The light is on, and you see every sock. "
        "What is the least number of socks that you take out to have a matching pair?",
        "2",
    ),
    Puzzle(
        "overtaking",
        "Going to St Ives, I overtook a man who was going there too, and with him went his "
        "seven wives. How many people were going to St Ives, counting me?",
        "9",
    ),
    Puzzle(
        "announced-day",
        "A judge tells a prisoner: you will be hanged on Friday at noon, and I tell you so "
        "that it will be no surprise. On which day will the prisoner be hanged?",
        "friday",
        ("monday", "tuesday", "wednesday", "thursday", "friday", "never"),
    ),
    Puzzle(
        "known-eggs",
        "You have two eggs and a building of 100 floors. From earlier trials you know that "
        "such eggs survive a fall from floor 41 and break from floor 42 on. What is the least "
        "number of drops that you need to find the highest floor from which an egg survives?",
        "0",
    ),
    Puzzle(
        "open-boxes",
        "Two boxes are open before you. In one you see 1000000 dollars, in the other 1000. "
        "Nothing changes any more, whatever a being that predicts your choice has predicted. "
        "You may take one box or both. How many dollars can you have at most?",
        "1001000",
    ),
)


def puzzles() -> Task:
    """All of them."""
    return Task("puzzles", tuple(map(_question, PUZZLES)), is_answer, _vote)


def _question(puzzle: Puzzle) -> Question:
    kind = "a number" if not puzzle.words else "one of: " + ", ".join(puzzle.words)
    prompt = (
        f"{puzzle.text} Please reason step by step, and put your final answer, {kind}, within "
        "\\boxed{}."
    )
    return Question(puzzle.name, prompt, {"answer": puzzle.answer})


def _vote(text: str) -> str | None:
    """A number where the answer has digits ("door 1"; "50%"), else a word."""
    found = final_words(text)
    if found is None or not any(character.isdigit() for character in found):
        return found
    value = numeric(re.sub(r"^[a-z]{1,20} (?=\d)", "", found.rstrip("% ")))
    return None if value is None else spell(value)
