"""The examples on training runs: what each claims to learn, it learns, in its quick form."""

from __future__ import annotations

import pytest
from example_modules import example_modules

pytest.importorskip("sklearn")

NAMES = ("digits", "datarater", "distill", "generated", "learned_optimiser")


@pytest.fixture(scope="module")
def example():
    with example_modules("training_runs", NAMES) as found:
        yield found


def test_the_rater_finds_wrong_labels(example):
    report = example.datarater.main(["--quick"])
    assert report["wrong labels found"] > 0.8  # 0.5 by chance
    assert report["accuracy after"] > report["accuracy before"] + 0.05


@pytest.mark.slow
def test_ten_learned_images_teach_more_than_ten_real_ones(example, tmp_path):
    report = example.distill.main(["--quick", "--output", str(tmp_path)])
    assert report["ten learned images"] > report["ten real digits"] + 0.1
    assert (tmp_path / "distill.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_generated_start_helps_where_steps_are_few(example):
    """200 meta steps do not suffice to learn sinusoids; less than their variance is asked for."""
    report = example.generated.main(["--quick"])
    assert all(0 < value < 4.5 for value in report.values())
    assert report["constant + generated, 3 steps"] < report["constant start, 3 steps (MAML)"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--recurrent"]], ids=["mlp", "lstm"])
def test_an_optimiser_learns_to_train(example, kind):
    """From 0.66, what the rule reaches before it is trained."""
    report = example.learned_optimiser.main(["--quick", *kind])
    assert report["learned optimiser"] < 0.6
