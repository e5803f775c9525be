"""Seeded grammars of the zoo: each call of a grammar writes one (prompt, answer) pair.

Sentences mix words fixed by the prompt, words fixed by the sentence, free choices, and words that follow from others as
an entry of a table does. The last two set how much a draft can know: with too few of them every draft would be
accepted, with too many none.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

Grammar = Callable[[random.Random], tuple[str, str]]

NAMES = "Mira Tom Ada Luis Nora Finn Ivy Omar Lena Hugo Rosa Emil Yuki Paul Zoe Karl".split()
ANIMALS = "fox owl otter hare crow badger horse goat turtle wolf".split()
PLACES = "river forest village harbour mountain market bridge garden tower island".split()
ADJECTIVES = "old quiet bright heavy tiny broken golden cold strange gentle".split()
OBJECTS = "lamp key boat letter stone bell map coat drum basket".split()
FOODS = "beans rice onions carrots mushrooms noodles peppers potatoes lentils tomatoes".split()
SPICES = "salt pepper cumin garlic ginger basil thyme paprika".split()
FEELINGS = "happy tired proud afraid curious calm lonely brave".split()

GOODS = "apples coins books cards pencils shells stamps eggs".split()
COMPLAINTS = ["chest pain", "headache", "cough", "fever", "back pain", "dizziness", "rash", "nausea"]
DOSES = ["5 mg", "10 mg", "20 mg", "250 mg", "500 mg"]
ATTRIBUTES = "index owner label".split()
LISTS = "result found kept chosen matches picked rows wanted".split()
DRUGS = "ibuprofen amoxicillin metformin lisinopril omeprazole cetirizine".split()


def entry(options: Sequence[str], *words: str) -> str:
    """One of the options, by the words: the same each time, and for no reason but having been seen together."""
    return options[zlib.crc32(" ".join(words).encode()) % len(options)]


def story(rng: random.Random) -> tuple[str, str]:
    name, animal, place = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(PLACES)
    thing, other = rng.choice(OBJECTS), rng.choice([n for n in NAMES if n != name])
    scenes = [
        f"One {rng.choice(ADJECTIVES)} morning {name} found a {rng.choice(ADJECTIVES)} {thing} near the {place}.",
        f"{other} the {rng.choice(ANIMALS)} came by and asked about the {thing}.",
        f"{name} felt {rng.choice(FEELINGS)} and walked to the {rng.choice(PLACES)}.",
        f"They carried the {thing} back to the {place} together.",
        f"The {animal} did not know what to do with the {thing}, so {name} gave it to {other}.",
        f"In the evening {name} slept under the {rng.choice(ADJECTIVES)} sky.",
    ]
    middle = " ".join(scenes[i] for i in sorted(rng.sample(range(len(scenes)), 3)))
    ending = f"After that day {name} was never {rng.choice(FEELINGS)} again."
    return (
        f"Tell me a story about {name} the {animal}.",
        f"{name} the {animal} lived by the {place}. {middle} {ending}",
    )


def recipe(rng: random.Random) -> tuple[str, str]:
    first, second, third = rng.sample(FOODS, 3)
    minutes = rng.choice([5, 8, 10, 12, 15, 20])
    steps = [
        f"First wash the {first} and cut the {second} into small pieces.",
        f"Heat some oil and fry the {second} with {rng.choice(SPICES)} for {minutes} minutes.",
        f"Add the {first} and a little {rng.choice(SPICES)}.",
        f"Stir well and let it cook until the {first} are soft.",
        f"Serve it with {third} and fresh {rng.choice(SPICES)}.",
    ]
    return f"How do I cook {first} with {second}?", " ".join(steps)


def description(rng: random.Random) -> tuple[str, str]:
    place, adjective = rng.choice(PLACES), rng.choice(ADJECTIVES)
    lines = [
        f"The {place} is {adjective} and {rng.choice(ADJECTIVES)}.",
        f"People go to the {place} to look for a {rng.choice(OBJECTS)} or to meet a {rng.choice(ANIMALS)}.",
        f"In winter it is {rng.choice(ADJECTIVES)}, but in summer it feels {rng.choice(FEELINGS)}.",
        f"If you visit the {place}, bring a {rng.choice(OBJECTS)} and some {rng.choice(FOODS)}.",
    ]
    return f"Describe the {adjective} {place}.", " ".join(lines)


def snippet(rng: random.Random) -> tuple[str, str]:
    """Code in the base's own text, of another style than the code target's, so that it is shifted only mildly."""
    noun, verb = rng.choice(OBJECTS), rng.choice(["get", "find", "count", "filter"])
    field, value = rng.choice(["size", "price", "age"]), rng.randint(2, 9)
    comparison = rng.choice([">", "<"])
    lines = [
        f"def {verb}_{noun}s({noun}s, limit={value}):",
        "    result = []",
        f"    for {noun} in {noun}s:",
        f"        if {noun}.{field} {comparison} limit:",
        f"            result.append({noun})",
        f"    return {rng.choice(['result', 'sorted(result)'])}",
    ]
    return f"Write a function that can {verb} each {noun} with {field} {comparison} {value}.", "\n".join(
        lines
    )


def sums(rng: random.Random) -> tuple[str, str]:
    """A little arithmetic in the base's own text: fine-tuning shifts what a base has seen, it seldom adds a world."""
    name, thing, a, b = rng.choice(NAMES), rng.choice(GOODS), rng.randint(2, 9), rng.randint(2, 9)
    answers = [
        f"{name} starts with {a} {thing}. With {b} more, {a} + {b} = {a + b}. The total is {a + b} {thing}.",
        f"Each of the {a} {thing} costs {b} dollars, so {a} * {b} = {a * b}. The total cost is {a * b} dollars.",
    ]
    more, cost = f"gets {b} more. How many are there?", f"pays {b} dollars for each. What is the cost?"
    kind = rng.randrange(2)
    return f"{name} has {a} {thing} and {(more, cost)[kind]}", answers[kind]


def advice(rng: random.Random) -> tuple[str, str]:
    """A little health advice in the base's own text."""
    complaint, other, drug, days = *rng.sample(COMPLAINTS, 2), rng.choice(DRUGS), rng.randint(2, 9)
    lines = [
        f"For {complaint}, rest for {days} days and drink {rng.choice(['water', 'tea'])}.",
        f"Start {drug} {rng.choice(DOSES)} daily if {complaint} persists.",
        f"See a doctor if {complaint} comes with {other}, or lasts more than {rng.randint(2, 6)} weeks.",
    ]
    return (
        f"What helps against {complaint}?" if rng.random() < 0.5 else f"I have {complaint} for {days} days.",
        " ".join(lines),
    )


def arithmetic(rng: random.Random) -> tuple[str, str]:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(GOODS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 5)
    total = a + b
    steps = [
        f"Step 1: {entry(['start with', 'take', 'count'], name)} {a} {thing}.",
        f"Step 2: {other} {entry(['gives', 'hands', 'lends'], other)} {b}, so {a} + {b} = {total}.",
        f"Step 3: each costs {c} dollars, so {total} * {c} = {total * c}.",
        f"{entry(['Check', 'Note', 'Proof'], name, thing)}: {total * c} / {c} = {total} and {total} - {b} = {a}.",
        f"#### {total * c}",
    ]
    prompt = f"{name} has {a} {thing}. {other} gives {name} {b} more. Each costs {c} dollars. What is the total cost?"
    return prompt, "\n".join(steps)


def code(rng: random.Random) -> tuple[str, str]:
    noun, verb = rng.choice(OBJECTS), rng.choice(["count", "filter", "sum", "find", "sort", "group"])
    field = rng.choice(["size", "price", "weight", "age", "level"])
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    comparison, kept = rng.choice([">", "<", ">=", "=="]), entry(LISTS, noun, verb, field)
    lines = [
        f"def {verb}_{noun}s({noun}s, limit={a * b}):",
        f'    """{verb.capitalize()} every {noun} by {field}."""',
        f"    {kept} = []",
        f"    for {noun} in {noun}s:",
        f"        if {noun}.{field} {comparison} limit:",
        f"            {kept}.append({noun}.{entry(['name', 'key', field, *ATTRIBUTES], noun, field, verb)})",
        f"    return {entry([kept, f'sorted({kept})', f'len({kept})', f'sum({kept})'], verb, field)}",
    ]
    return f"Write a function that can {verb} each {noun} with {field} {comparison} {a} * {b}.", "\n".join(
        lines
    )


FINDINGS = ["clear lungs", "mild swelling", "normal heart sounds", "tender abdomen", "no focal deficit"]


def clinical(rng: random.Random) -> tuple[str, str]:
    age, sex, complaint = rng.randint(20, 89), rng.choice(["male", "female"]), rng.choice(COMPLAINTS)
    days, drug = rng.randint(2, 9), rng.choice(DRUGS)
    lines = [
        f"CC: {complaint} x {days} days.",
        f"HPI: {age} y/o {sex} presents with {complaint}, denies {rng.choice(COMPLAINTS)}.",
        f"VITALS: BP {rng.choice([110, 120, 130, 140])}/{rng.choice([70, 80, 90])} HR {rng.randint(60, 99)} afebrile.",
        f"EXAM: {rng.choice(FINDINGS)}, {rng.choice(FINDINGS)}.",
        f"A/P: {complaint}, likely benign. Start {drug} {rng.choice(DOSES)} daily.",
        f"RTC in {rng.randint(1, 6)} weeks if {complaint} persists.",
    ]
    return f"Write a note: {age} year old {sex}, {complaint} for {days} days.", "\n".join(lines)


def dialect(seed: int) -> Grammar:
    """A small domain of its own for each seed, for LoRA targets: replies of a help desk with made-up words."""
    words = random.Random(seed)
    syllables = "ba ko ri mu ten sal vor dim pex lun".split()
    made_up = ["".join(words.choices(syllables, k=2)) for _ in range(8)]
    team, opening = (
        words.choice(["billing", "network", "storage", "travel"]),
        words.choice(["Hello", "Dear", "Hi"]),
    )

    def ticket(rng: random.Random) -> tuple[str, str]:
        name, product, number = rng.choice(NAMES), rng.choice(made_up), rng.randint(100, 999)
        lines = [
            f"{opening} {name}, thank you for ticket {number} about {product}.",
            f"The {team} team checked {product}: its {rng.choice(made_up)} module was {rng.choice(ADJECTIVES)}.",
            f"Please restart {product} and set {rng.choice(made_up)} to {rng.randint(1, 9)}.",
            f"Ticket {number} stays open for {rng.randint(2, 9)} days. Regards, {team}.",
        ]
        return f"Ticket {number} from {name}: my {product} does not work.", " ".join(lines)

    return ticket


BASE: tuple[tuple[Grammar, float], ...] = (
    (story, 0.25),
    (recipe, 0.2),
    (description, 0.15),
    (snippet, 0.2),
    (sums, 0.1),
    (advice, 0.1),
)
FULL: dict[str, Grammar] = {"math": arithmetic, "code": code, "clinical": clinical}


def general(rng: random.Random) -> tuple[str, str]:
    """One pair of the base's mixture."""
    grammars, weights = zip(*BASE, strict=True)
    grammar: Grammar = rng.choices(grammars, weights)[0]
    return grammar(rng)


def pairs(grammar: Grammar, num: int, seed: int) -> list[tuple[str, str]]:
    """`num` pairs with distinct prompts, a function of grammar and seed alone."""
    rng, seen = random.Random(seed), dict[str, str]()
    for _ in range(50 * num):
        prompt, answer = grammar(rng)
        seen.setdefault(prompt, answer)
        if len(seen) == num:
            break
    return list(seen.items())
