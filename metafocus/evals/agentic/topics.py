"""Questions with numbers: the text, the right value, and the values of typical mistakes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """A question, its value and its unit, and the values of typical mistakes."""

    question: str
    value: float
    unit: str
    mistakes: tuple[float, ...]


def kinetic_energy(rng: random.Random) -> Exercise:
    """E = m v^2 / 2. Mistakes: no half, no square, km/h for m/s."""
    mass, speed = rng.randrange(600, 2400, 50), rng.randrange(30, 140, 2)
    v = speed / 3.6
    return Exercise(
        f"A car of {mass} kg drives at {speed} km/h. What is its kinetic energy?",
        mass * v**2 / 2 / 1e3,
        "kJ",
        (mass * v**2 / 1e3, mass * speed**2 / 2 / 1e3, mass * v / 2 / 1e3),
    )


def free_fall(rng: random.Random) -> Exercise:
    """Speed v = sqrt(2 g h). Mistakes: no two, no root, one g too many."""
    height, g = rng.randrange(4, 90), 9.81
    return Exercise(
        f"A stone is dropped from rest from a height of {height} m. Neglecting the air, how fast "
        f"is it when it reaches the ground (g = {g} m/s^2)?",
        math.sqrt(2 * g * height),
        "m/s",
        (math.sqrt(g * height), 2 * g * height, math.sqrt(2 * height / g), g * height),
    )


def parallel_resistors(rng: random.Random) -> Exercise:
    """I = U (1/R1 + 1/R2). Mistakes: in series, one resistor alone, the mean."""
    a, b = rng.sample(range(20, 400, 5), 2)
    volts = rng.choice((5, 9, 12, 24, 48))
    return Exercise(
        f"Two resistors of {a} ohm and {b} ohm are connected in parallel to an ideal source of "
        f"{volts} V. What current does the source deliver?",
        1e3 * volts * (1 / a + 1 / b),
        "mA",
        (1e3 * volts / (a + b), 1e3 * volts / a, 2e3 * volts / (a + b), 1e3 * volts / b),
    )


def lens(rng: random.Random) -> Exercise:
    """1/f = 1/g + 1/b. Mistakes: the signs, the difference, no reciprocal."""
    focus = rng.randrange(5, 30)
    far = focus + rng.randrange(4, 90)
    return Exercise(
        f"An object stands {far} cm before a thin converging lens of {focus} cm focal length. How "
        "far behind the lens is its image?",
        focus * far / (far - focus),
        "cm",
        (focus * far / (far + focus), float(far - focus), float(far + focus), far / focus),
    )


def photon_energy(rng: random.Random) -> Exercise:
    """E = h c / wavelength. Mistakes: the wrong power of ten, frequency for wavelength."""
    wavelength = rng.randrange(150, 950, 5)
    value = 1239.842 / wavelength
    return Exercise(
        f"What is the energy of a photon of wavelength {wavelength} nm (h c = 1239.842 eV nm)?",
        value,
        "eV",
        (wavelength / 1239.842, 2 * value, value / (2 * math.pi), 10 * value),
    )


def decay(rng: random.Random) -> Exercise:
    """A = A0 2^(-t/T). Mistakes: e for 2, linear loss, what is gone for what is left."""
    half = rng.randrange(2, 60)
    days, start = rng.randrange(half // 2 + 1, 3 * half), rng.randrange(20, 900, 10)
    left = 2.0 ** (-days / half)
    return Exercise(
        f"A sample has an activity of {start} MBq, its half-life is {half} days. What is its "
        f"activity after {days} days?",
        start * left,
        "MBq",
        (start * math.exp(-days / half), start * (1 - left), start / (1 + days / half)),
    )


def strong_acid(rng: random.Random) -> Exercise:
    """Dilute, then pH = -log10 c. Mistakes: not diluted, the natural logarithm, volume added."""
    acid, water = rng.randrange(5, 60), rng.randrange(80, 900, 10)
    c = rng.choice((0.02, 0.05, 0.1, 0.15, 0.2, 0.25))
    after = c * acid / (acid + water)
    return Exercise(
        f"{acid} mL of hydrochloric acid of {c} mol/L are mixed with {water} mL of water. What is "
        "the pH, if volumes add up and all of the acid dissociates?",
        -math.log10(after),
        "",
        (-math.log10(c), -math.log(after), -math.log10(c * acid / 1000), 14 + math.log10(after)),
    )


def gas_volume(rng: random.Random) -> Exercise:
    """V = n R T / p. Mistakes: Celsius for kelvin, grams for moles, the molar volume at 0 C."""
    name, molar = rng.choice(
        (("nitrogen", 28.01), ("oxygen", 32.0), ("carbon dioxide", 44.01), ("methane", 16.04))
    )
    grams, warm, kpa = rng.randrange(4, 90), rng.randrange(12, 95), rng.randrange(60, 240, 5)
    n = grams / molar
    return Exercise(
        f"What volume do {grams} g of {name} (M = {molar} g/mol) fill as an ideal gas at {warm} C "
        f"and {kpa} kPa (R = 8.314 J/(mol K), 0 C = 273.15 K)?",
        n * 8.314 * (warm + 273.15) / kpa,
        "L",
        (
            n * 8.314 * warm / kpa,
            grams * 8.314 * (warm + 273.15) / kpa,
            n * 22.41,
            n * 8.314 * 273.15 / kpa,
        ),
    )


def combustion(rng: random.Random) -> Exercise:
    """Mass of CO2 from burning an alkane. Mistakes: one CO2 for each molecule, equal masses, O2."""
    carbons, name = rng.choice(((3, "propane"), (4, "butane"), (5, "pentane"), (8, "octane")))
    grams = rng.randrange(10, 400, 2)
    molar = 12.011 * carbons + 1.008 * (2 * carbons + 2)
    n = grams / molar
    return Exercise(
        f"What mass of carbon dioxide forms when {grams} g of {name} burn completely (C 12.011, "
        "H 1.008, O 15.999 g/mol)?",
        n * carbons * 44.009,
        "g",
        (n * 44.009, grams * 44.009 / 12.011, n * (3 * carbons + 1) / 2 * 31.998),
    )


def carriers(rng: random.Random) -> Exercise:
    """2 q (1 - q) with q = sqrt(incidence). Mistakes: q, 2 q^2, no two, the incidence."""
    one_in = rng.randrange(1200, 30000, 100)
    q = math.sqrt(1 / one_in)
    return Exercise(
        f"A recessive disease affects one in {one_in} of a population in Hardy-Weinberg "
        "equilibrium. What share of the population are heterozygous carriers?",
        200 * q * (1 - q),
        "%",
        (100 * q, 200 / one_in, 100 * q * (1 - q) / 2, 100 * (1 - q) ** 2),
    )


def growth(rng: random.Random) -> Exercise:
    """Doublings = log2(N/N0). Mistakes: natural or decimal logarithm, the ratio in halves."""
    start, minutes = rng.randrange(2, 90), rng.randrange(18, 75)
    end = start * rng.randrange(150, 9000, 10)
    ratio = end / start
    return Exercise(
        f"A culture of {start} thousand bacteria doubles every {minutes} minutes. How long until "
        f"there are {end} thousand?",
        minutes * math.log2(ratio) / 60,
        "h",
        (
            minutes * math.log(ratio) / 60,
            minutes * math.log10(ratio) / 60,
            minutes * ratio / 2 / 60,
            math.log2(ratio),
        ),
    )


def enzyme(rng: random.Random) -> Exercise:
    """Rate v = Vmax S / (Km + S). Mistakes: the constants exchanged, no saturation, the rest."""
    vmax, km, s = rng.randrange(20, 400, 5), rng.randrange(4, 90), rng.randrange(3, 200)
    return Exercise(
        f"An enzyme follows Michaelis-Menten kinetics with Vmax = {vmax} umol/min and Km = {km} "
        f"umol/L. What is its rate at {s} umol/L of substrate?",
        vmax * s / (km + s),
        "umol/min",
        (vmax * km / (km + s), vmax * s / km, vmax * s / (2 * km + s), vmax * (s + km) / (2 * s)),
    )


TOPICS: dict[str, tuple[Callable[[random.Random], Exercise], ...]] = {
    "physics": (kinetic_energy, free_fall, parallel_resistors, lens, photon_energy, decay),
    "chemistry": (strong_acid, gas_volume, combustion),
    "biology": (carriers, growth, enzyme),
}
