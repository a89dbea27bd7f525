"""The prompts: plain English made up from fixed sentences, the same on every run and for both servers.

Every conversation opens with a salt of its own, so that no two share a prefix beyond the template's first tokens.
"""

from __future__ import annotations

import hashlib
import random

from bench.client import Message

_SENTENCES = (
    "The harbour was quiet in the morning, and only two boats came back before noon.",
    "A small library can lend tools as well as books, if somebody looks after them.",
    "Rain fell on the upper valley for three days, and the river rose by almost a metre.",
    "The recipe asks for flour, salt, cold water and a little more patience than most people have.",
    "Engineers measured the bridge twice a year and wrote every number down by hand.",
    "Our neighbour keeps bees on the roof and gives away the honey at the end of summer.",
    "The train to the coast leaves at seven, but the ticket office does not open until eight.",
    "In the second experiment the samples were heated slowly and weighed after each hour.",
    "The museum moved its oldest maps to a darker room, because the ink had begun to fade.",
    "A good password is long, and it is never the name of the dog.",
    "They planted forty apple trees along the road, and thirty-six of them lived.",
    "The committee agreed on the budget after a long evening and several pots of tea.",
    "Solar panels on the school now cover about two thirds of what the kitchen uses.",
    "The doctor explained the treatment in simple words and drew a picture of the knee.",
    "Before the storm the fishermen pulled the nets in and tied the boats together.",
    "The program reads a list of names, sorts them, and prints each of them once.",
    "Nobody remembered who had painted the door green, but everybody liked it.",
    "The clock in the tower is four minutes slow, and the whole town has got used to it.",
    "A farmer needs to know the soil, the weather and the price of diesel.",
    "The letter arrived two weeks late, with a stamp from a country that no longer exists.",
    "Children learn to swim in the shallow lake behind the old brick factory.",
    "The second half of the concert was better, mostly because the heating had come on.",
    "Each row of the table holds a date, a place, an amount and the initials of a clerk.",
    "The mountain hut has room for twelve people and, in bad weather, for thirty.",
)

_TASKS = (
    "Write a short story that begins with these lines.",
    "Explain to a beginner what these lines have in common.",
    "Summarise these lines and then say what is missing.",
    "Continue this report in the same tone.",
    "Turn these lines into a list of practical tips, with a reason for each.",
    "Write a letter to a friend about what happened here.",
)


def conversation(salt: str, task: str, body: str) -> list[Message]:
    """A system message that differs from the first character on for every salt, and one user message."""
    unique = hashlib.sha256(salt.encode()).hexdigest()[:12]
    return [
        {"role": "system", "content": f"{unique}: you are a helpful assistant who answers at length."},
        {"role": "user", "content": f"{task}\n\n{body}"},
    ]


def short_prompt(salt: str) -> list[Message]:
    """About 60 to 200 tokens, decided by the salt alone."""
    choose = random.Random(salt)
    body = " ".join(choose.sample(_SENTENCES, choose.randint(2, 7)))
    return conversation(salt, choose.choice(_TASKS), body)


def text_of_words(salt: str, words: int) -> str:
    """Running text of about `words` words, decided by the salt alone."""
    choose = random.Random(salt)
    sentences: list[str] = []
    count = 0
    while count < words:
        sentence = choose.choice(_SENTENCES)
        sentences.append(sentence)
        count += sentence.count(" ") + 1
    return " ".join(sentences)


def long_prompt(salt: str, words: int) -> list[Message]:
    """A prompt around a text of about `words` words."""
    return conversation(salt, "Read this text carefully and say what it is about.", text_of_words(salt, words))
