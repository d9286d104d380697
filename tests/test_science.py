"""The built-in questions, derived again from their text, and GPQA's file format."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter

import pytest

from metafocus.errors import DataError
from metafocus.evals.agentic import Choice, read_gpqa, science
from metafocus.evals.agentic._science import MAKERS
from metafocus.evals.agentic.questions import COLUMNS

# Each oracle reads the numbers of the question and goes another way than the formula:
# it steps, counts or bisects.


def bisect(f, low, high):
    """Where a rising function crosses 0."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return low


def kinetic_energy(mass, speed):
    """Work of a constant force of 1 N over the way to that speed, summed up."""
    v, n = speed * 1000 / 3600, 20_000
    duration = mass * v  # at 1 N
    step = duration / n
    way = sum((i + 0.5) * step / mass * step for i in range(n))
    return way / 1000


def free_fall(height, g, *_):
    """A fall in small steps."""
    y, v, dt = float(height), 0.0, 1e-4
    while y > 0:
        v += g * dt / 2
        y -= v * dt
        v += g * dt / 2
    return v


def parallel_resistors(a, b, volts):
    """One resistor in their place, found by Kirchhoff: its current is the sum of theirs."""
    together = bisect(lambda r: r * (a + b) - a * b, 1e-3, max(a, b))
    return volts / together * 1000


def lens(far, focus):
    """Two rays from the tip: through the centre, and parallel to the axis through the focus."""

    def gap(x):  # heights of the rays behind the lens, for an object of height 1
        return (-x / far) - (1 - x / focus)

    return bisect(gap, 0, 1e5)


def photon_energy(wavelength, hc):
    """From the frequency, with the constants."""
    h, c, e = 6.62607015e-34, 2.99792458e8, 1.602176634e-19
    return h * (c / (wavelength * 1e-9)) / e


def decay(start, half, days):
    """Step by step: each shrinks it alike, and a half-life of them by half."""
    steps = 4000
    shrink = bisect(lambda r: r**steps - 0.5, 0, 1)
    return start * shrink ** (steps * days / half)


def strong_acid(acid, c, water):
    """The concentration by moles and litres; the pH at which there are so many protons."""
    concentration = (acid / 1000 * c) / ((acid + water) / 1000)
    return bisect(lambda ph: concentration - 10.0**-ph, -2, 14)


def gas_volume(grams, molar, warm, kpa, *_):
    """By molecules: p V = N k T."""
    molecules = grams / molar * 6.02214076e23
    return molecules * 1.380649e-23 * (warm + 273.15) / (kpa * 1000) * 1000


ALKANES = {"propane": 3, "butane": 4, "pentane": 5, "octane": 8}


def combustion(grams, *masses, text):
    """All carbon of the alkane is in the dioxide: by its share of the mass of either."""
    carbon, hydrogen, oxygen = masses[0], masses[1], masses[2]
    atoms = next(n for name, n in ALKANES.items() if name in text)
    share = atoms * carbon / (atoms * carbon + (2 * atoms + 2) * hydrogen)
    return grams * share / (carbon / (carbon + 2 * oxygen))


def carriers(one_in):
    """Draw two alleles, and count the pairs with one of them."""
    q = bisect(lambda x: x * x - 1 / one_in, 0, 1)
    pairs = {
        (a, b): pa * pb for a, pa in (("r", q), ("R", 1 - q)) for b, pb in (("r", q), ("R", 1 - q))
    }
    return 100 * sum(p for (a, b), p in pairs.items() if a != b)


def growth(start, minutes, end):
    return bisect(lambda hours: start * 2.0 ** (hours * 60 / minutes) - end, 0, 40)


def enzyme(vmax, km, s):
    """The steady state of a single binding site: bound share by mass action."""
    bound = bisect(lambda x: x * km - (1 - x) * s, 0, 1)
    return vmax * bound


ORACLES = (kinetic_energy, free_fall, parallel_resistors, lens, photon_energy, decay, strong_acid,
           gas_volume, combustion, carriers, growth, enzyme)  # fmt: skip
BY_NAME = {oracle.__name__: oracle for oracle in ORACLES}


def derive(question: Choice) -> float:
    name = question.topic.partition(": ")[2]
    text = question.question.replace("h c", "").replace("m/s^2", "")
    text = re.sub(r"\b[CHO] (?=\d)", "", text)
    numbers = [float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]
    if name == "combustion":
        return combustion(*numbers, text=text)
    return BY_NAME[name](*numbers)


def number(choice: str) -> float:
    return float(choice.split()[0])


def test_there_is_an_oracle_for_every_topic():
    assert BY_NAME.keys() == MAKERS.keys()
    assert {field for field, _ in MAKERS.values()} == {"physics", "chemistry", "biology"}


@pytest.mark.parametrize("name", MAKERS)
def test_the_answers_follow_from_the_text(name):
    questions = [q for q in science(20 * len(MAKERS), seed=7) if q.topic.endswith(f": {name}")]
    assert len(questions) == 20
    for question in questions:
        value = derive(question)
        numbers = [number(choice) for choice in question.choices]
        # Three digits are shown; the oracles' own steps are a hundred times finer.
        assert numbers[question.answer] == pytest.approx(value, rel=6e-3), question
        others = [x for i, x in enumerate(numbers) if i != question.answer]
        assert all(abs(x / value - 1) > 0.02 for x in others), question
        units = {choice.partition(" ")[2] for choice in question.choices}
        assert len(units) == 1  # the unit gives nothing away


def test_sets():
    questions = science(600)
    assert len({q.question for q in questions}) > 550
    letters = Counter(q.letter for q in questions)
    assert set(letters) == set("ABCD") and min(letters.values()) > 110  # 150, deviation 10.6
    assert all(len(q.choices) == 4 == len(set(q.choices)) for q in questions)
    assert science(30) == questions[:30] and science(30, seed=1) != questions[:30]
    # Neither the smallest, the largest nor a middle choice is mostly right.
    ranks = Counter(
        sorted(map(number, q.choices)).index(number(q.choices[q.answer])) for q in questions
    )
    assert max(ranks.values()) < 330, ranks
    with pytest.raises(DataError, match=r"n must be.*got 0"):
        science(0)


def rows(**changes):
    row = {"Record ID": "x", "Question": "Q, with\na line?", "Correct Answer": "right ",
           "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3",
           "High-level domain": "Physics"}  # fmt: skip
    return {**row, **changes}


def write(path, *records):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def test_gpqa_files(tmp_path):
    path = write(tmp_path / "gpqa.csv", *[rows(Question=f"Question {i}?") for i in range(200)])
    questions = read_gpqa(path, seed=1)
    assert [q.question for q in questions] == [f"Question {i}?" for i in range(200)]
    assert all(q.choices[q.answer] == "right" and q.topic == "Physics" for q in questions)
    assert all(sorted(q.choices) == ["right", "w1", "w2", "w3"] for q in questions)
    counts = Counter(q.letter for q in questions)
    assert set(counts) == set("ABCD") and min(counts.values()) > 30  # 50, deviation 6
    assert read_gpqa(path, seed=1) == questions != read_gpqa(path, seed=2)
    (one,) = read_gpqa(write(tmp_path / "one.csv", rows()))
    assert one.question == "Q, with\na line?" and "Q, with" in one.prompt
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets write it
    assert read_gpqa(path, seed=1) == questions


def test_bad_gpqa_files(tmp_path):
    path = tmp_path / "bad.csv"
    with pytest.raises(DataError, match="is not a file"):
        read_gpqa(path)
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(DataError, match="holds no questions"):
        read_gpqa(path)
    path.write_bytes(b"Question\n\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_gpqa(path)
    write(path, rows(), rows(**{"Incorrect Answer 2": ""}))
    with pytest.raises(DataError, match="question 2: 'Incorrect Answer 2' is missing"):
        read_gpqa(path)
    path.write_text("Question,Correct Answer\nWhat?,a\n")
    with pytest.raises(DataError, match="'Incorrect Answer 1' is missing"):
        read_gpqa(path)
    write(path, rows(**{"Incorrect Answer 1": "right"}))
    with pytest.raises(DataError, match=r"question 1: choices=.* different choices"):
        read_gpqa(path)


def test_bad_choices():
    for choices, answer in ((("a",), 0), (("a", "a"), 0), (("a", "b"), 2), (("a", "b"), -1)):
        with pytest.raises(DataError, match="different choices"):
            Choice("?", choices, answer)
    assert math.isclose(number("1.5e+03 J"), 1500)
