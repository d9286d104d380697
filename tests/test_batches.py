"""`mf.Batches` and `mf.PerStep` by themselves, and batches of a data set."""

from __future__ import annotations

import loops
import pytest
import torch
from loops import hypergradient, slices, start, upper, value
from problems import assert_close
from ways import UNROLLED, tolerance

import metafocus as mf

CASE = loops.case()


# --- Batches.from_dataset -----------------------------------------------------------------------


class Squares(torch.utils.data.Dataset):
    """A map-style data set of dicts."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        return {"x": torch.tensor(float(i)), "y": torch.tensor(float(i * i))}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rows_that_are_dicts_gain_their_index():
    stream = mf.Batches.from_dataset(Squares(), batch_size=3, steps=2, generator=seeded())
    for step in range(2):
        batch = stream.at(step)
        assert sorted(batch) == ["index", "x", "y"] and batch["index"].shape == (3,)
        assert torch.equal(batch["x"], batch["index"].float())
        assert torch.equal(batch["y"], batch["index"].float() ** 2)
    assert "index" not in Squares()[0]


ROWS = {
    "tensors": torch.arange(7.0),
    "pairs": torch.utils.data.TensorDataset(torch.arange(7.0), torch.arange(7.0) ** 2),
    "list": [float(i) for i in range(7)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_other_rows_become_pairs_with_their_index(kind):
    stream = mf.Batches.from_dataset(ROWS[kind], batch_size=4, steps=3, generator=seeded())
    for step in range(3):
        index, row = stream.at(step)
        x = row[0] if kind == "pairs" else row
        assert torch.equal(index.double(), x.double())


@pytest.mark.parametrize(("size", "steps"), [(3, 2), (7, 1), (4, 7), (10, 5), (1, 14)])
def test_every_epoch_is_one_permutation(size, steps):
    stream = mf.Batches.from_dataset(Squares(), batch_size=size, steps=steps, generator=seeded())
    rows = torch.cat([stream.at(t)["index"] for t in range(steps)])
    assert len(rows) == size * steps
    for epoch in rows.split(7):
        assert len(set(epoch.tolist())) == len(epoch)
    assert rows[:7].tolist() != list(range(7))
    if size * steps >= 14:
        assert rows[:7].tolist() != rows[7:14].tolist()


def test_the_order_is_drawn_once_at_construction():
    generator = seeded()
    stream = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=generator)
    before = generator.get_state()
    first = [stream.at(t)["index"].tolist() for t in range(4)]
    assert torch.equal(generator.get_state(), before)
    torch.manual_seed(5)
    assert [stream.at(t)["index"].tolist() for t in reversed(range(4))][::-1] == first
    again = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=seeded())
    assert [again.at(t)["index"].tolist() for t in range(4)] == first
    other = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=seeded(1))
    assert [other.at(t)["index"].tolist() for t in range(4)] != first
    # The generator goes on: a second stream of it is another one.
    second = mf.Batches.from_dataset(Squares(), batch_size=3, steps=4, generator=generator)
    assert [second.at(t)["index"].tolist() for t in range(4)] != first


def test_own_collate():
    stream = mf.Batches.from_dataset(
        [[1, 2], [3], [4, 5, 6]],
        batch_size=2,
        steps=1,
        generator=seeded(),
        collate=lambda rows: [len(row) + 10 * index for index, row in rows],
    )
    assert set(stream.at(0)) <= {2, 11, 23}


def test_from_dataset_refuses_what_it_cannot_draw_from():
    good = {"batch_size": 2, "steps": 2, "generator": seeded()}
    loader = torch.utils.data.DataLoader(Squares())
    with pytest.raises(mf.errors.ProblemError, match=r"map-style.*DataLoader"):
        mf.Batches.from_dataset(loader, **good)
    with pytest.raises(mf.errors.ProblemError, match="map-style"):
        mf.Batches.from_dataset(iter([1, 2]), **good)
    with pytest.raises(mf.errors.ProblemError, match="dataset is empty"):
        mf.Batches.from_dataset([], **good)
    for name in ("batch_size", "steps"):
        for bad in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be an integer"):
                mf.Batches.from_dataset(Squares(), **{**good, name: bad})
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator"):
        mf.Batches.from_dataset(Squares(), **{**good, "generator": None})


@pytest.mark.parametrize("name", [n for n, (_, last) in UNROLLED.items() if last is None])
def test_weights_of_samples_are_looked_up_by_their_index(name):
    """A training run of minibatches, two epochs long: the weight of each sample is learned."""
    g = torch.Generator().manual_seed(1)
    rows = [
        {
            "x": torch.randn(3, generator=g, dtype=torch.float64),
            "y": torch.randn((), generator=g, dtype=torch.float64),
        }
        for _ in range(loops.SAMPLES)
    ]
    stream = mf.Batches.from_dataset(rows, batch_size=5, steps=5, generator=seeded())

    def loss(fast, slow, batch):
        return loops.inner(fast, slow, (batch["x"], batch["y"], batch["index"]))

    meta = mf.bilevel(
        mf.Problem(loss, upper, start), solver=loops.solver(5), estimator=UNROLLED[name][0]
    )
    query = slices(CASE.episode().query)[0]
    got = mf.hypergrad(meta)(CASE.outer, mf.Episode(stream, query))[0]
    permutations = seeded()
    order = torch.cat([torch.randperm(loops.SAMPLES, generator=permutations) for _ in range(3)])
    batches = [
        (torch.stack([rows[i]["x"] for i in part]), torch.stack([rows[i]["y"] for i in part]), part)
        for part in order[:25].split(5)
    ]
    want = hypergradient(CASE.outer, lambda o: value(o, batches, query))
    assert_close(got, want, tolerance(name))


# --- single values ------------------------------------------------------------------------------


def test_per_step_is_a_pytree_and_keeps_its_numbers():
    stream = mf.PerStep({"x": torch.arange(12).reshape(4, 3)})
    leaves, spec = torch.utils._pytree.tree_flatten(stream)
    assert len(leaves) == 1
    assert torch.utils._pytree.tree_unflatten(leaves, spec).at(1)["x"].tolist() == [3, 4, 5]
    part = stream.part(range(1, 3))
    assert part.tree["x"].shape == (2, 3) and part.at(2)["x"].tolist() == [6, 7, 8]
    for step in (0, 3):
        with pytest.raises(mf.errors.ProblemError, match=rf"PerStep has no data.*step {step}"):
            part.at(step)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_batches_checks_its_steps(steps):
    with pytest.raises(ValueError, match="steps must be an integer"):
        mf.Batches(lambda step: None, steps)


def test_batches_refuses_steps_that_it_does_not_hold():
    stream = mf.Batches(lambda step: step, 3)
    assert [stream.at(t) for t in range(3)] == [0, 1, 2]
    for step in (-1, 3):
        with pytest.raises(mf.errors.ProblemError, match=f"holds 3 steps.*step {step}"):
            stream.at(step)


# --- data sets, and weights of many rows -----------------------------------------------------


def test_a_data_set_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [0.0, 1.0, 2.0], "name": ["a", "b", "c"]})
    stream = mf.Batches.from_dataset(table, batch_size=2, steps=3, generator=seeded())
    for step in range(3):
        batch = stream.at(step)
        assert torch.equal(batch["index"], stream.rows[step])
        assert torch.equal(batch["x"], batch["index"].double())
        assert batch["name"] == ["abc"[i] for i in batch["index"]]
    tensors = table.with_format("torch", columns=["x"])
    stream = mf.Batches.from_dataset(tensors, batch_size=2, steps=3, generator=seeded())
    assert torch.equal(stream.at(1)["x"], stream.at(1)["index"].float())


def test_rows_are_read_at_once_where_the_data_set_can():
    class Together(Squares):
        def __init__(self):
            self.calls = []

        def __getitems__(self, rows):
            self.calls.append(rows)
            return [self[i] for i in rows]

    data = Together()
    stream = mf.Batches.from_dataset(data, batch_size=3, steps=2, generator=seeded())
    batch = stream.at(0)
    assert data.calls == [batch["index"].tolist()]


def test_a_loader_is_refused_with_the_form_that_works():
    loader = torch.utils.data.DataLoader(Squares(), batch_size=2)
    form = r", got a DataLoader.*mf\.Batches\.from_dataset\(loader\.dataset"
    with pytest.raises(mf.errors.ProblemError, match="dataset must be map-style" + form):
        mf.Batches.from_dataset(loader, batch_size=2, steps=1, generator=seeded())
    meta = mf.bilevel(loops.PROBLEM, solver=loops.solver(), estimator=mf.FirstOrder())
    with pytest.raises(mf.errors.ProblemError, match="tensors or a stream" + form):
        meta(CASE.leaves(), mf.Episode(loader, CASE.episode().query))
    stream = mf.Batches.from_dataset(
        loader.dataset, batch_size=2, steps=1, generator=seeded(), collate=loader.collate_fn
    )
    assert sorted(stream.at(0)) == ["index", "x", "y"]


@pytest.mark.parametrize("columns", [(torch.ones(3, 2), torch.ones(3)), {"x": torch.ones(3, 2)}])
def test_columns_are_not_rows(columns):
    with pytest.raises(mf.errors.ProblemError, match=r"must be rows.*of columns.*TensorDataset"):
        mf.Batches.from_dataset(columns, batch_size=1, steps=1, generator=seeded())


def test_an_index_of_the_rows_own_is_not_overwritten():
    def drawn(indices):
        rows = [{"index": i} for i in indices]
        return mf.Batches.from_dataset(rows, batch_size=2, steps=1, generator=seeded()).at(0)

    assert sorted(drawn([0, 1])["index"].tolist()) == [0, 1]
    with pytest.raises(mf.errors.ProblemError, match=r"an entry 'index' of its own, 8.*Rename"):
        drawn([0, 8])


def test_an_iterable_data_set_is_refused():
    class Lines(torch.utils.data.IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            yield from range(3)

    with pytest.raises(mf.errors.ProblemError, match=r"map-style.*got Lines.*list or a file"):
        mf.Batches.from_dataset(Lines(), batch_size=2, steps=1, generator=seeded())


@pytest.mark.parametrize(
    "estimator",
    [mf.Unrolled(), mf.Unrolled(recompute=True), mf.Unrolled(store=mf.stores.schedule(3))],
    ids=["graph", "recompute", "store"],
)
def test_zipped_weights_have_the_derivative_of_looked_up_ones(estimator):
    x, y, _ = (v[0].flatten(0, 1) for v in CASE.episodes.support.tree)
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    stream = mf.Batches.from_dataset(rows, batch_size=4, steps=loops.STEPS, generator=seeded())
    query = slices(CASE.episode().query)[-1]

    def error(fast, batch):
        return (loops.predict(fast, batch["x"]) - batch["y"]) ** 2

    def looked_up(fast, slow, batch):
        return (slow["all"][batch["index"]] * error(fast, batch)).mean()

    def given(fast, slow, data):
        batch, weight = data
        return (weight * error(fast, batch)).mean()

    def at_once(slow, episode):
        weights = mf.PerStep(slow["all"][stream.rows])
        return mf.Episode(mf.zipped(episode.support, weights), episode.query)

    outer = {**CASE.outer, "all": torch.linspace(0.5, 1.5, len(rows), dtype=x.dtype)}

    def by(problem):
        meta = mf.bilevel(problem, solver=loops.solver(), estimator=estimator)
        leaves = {k: v.clone().requires_grad_() for k, v in outer.items()}
        meta(leaves, mf.Episode(stream, query))[0].backward()
        return [leaves[k].grad for k in ("all", "w1", "log_lr")]

    got = by(mf.Problem(given, upper, start, prepare=at_once))
    assert_close(got, by(mf.Problem(looked_up, upper, start)), 1e-12)


def test_a_million_weights_have_one_dense_gradient():
    from metafocus.comparison.memory import peak_bytes

    size, steps = 1_000_000, 12
    stream = mf.Batches(
        lambda t: torch.full((4,), t + 1.0), steps, torch.arange(steps * 4).reshape(steps, 4)
    )

    def inner(fast, slow, data):
        x, weight = data
        return (weight * (fast["w"] - x) ** 2).mean()

    problem = mf.Problem(
        inner,
        lambda fast, slow, data: fast["w"] ** 2,
        lambda slow, support: {"w": torch.zeros(())},
        prepare=lambda slow, episode: mf.Episode(
            mf.zipped(episode.support, mf.PerStep(slow["weight"][stream.rows])), episode.query
        ),
    )
    weight = torch.ones(size, requires_grad=True)
    for estimator in (mf.Unrolled(), mf.Unrolled(store=mf.stores.schedule(4))):
        meta = mf.bilevel(problem, solver=mf.SGD(0.1, steps), estimator=estimator)
        meta({"weight": weight}, mf.Episode(stream, None))[0].backward()
        weight.grad = None
        _, peak = peak_bytes(
            lambda meta=meta: meta({"weight": weight}, mf.Episode(stream, None))[0].backward()
        )
        # Four bytes a weight: the gradient, and the zeros that the rows are put into.
        assert peak < 2.2 * 4 * size
        assert (weight.grad != 0).sum() == steps * 4
        weight.grad = None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, 4).long(), r"shape \[steps, batch_size\] with steps=3, got .* \[2, 4\]"),
        (torch.zeros(3, 4), "must be integers"),
        (torch.tensor([[0], [7], [1]]), "hold the number 7, and the data set has rows 0 to 6"),
        (torch.tensor([[0], [-1], [1]]), "hold the number -1"),
    ],
)
def test_rows_out_of_range_are_refused(rows, message):
    with pytest.raises(mf.errors.ProblemError, match=message):
        mf.Batches(lambda step: step, 3, rows, 7)


def test_rows_that_no_batch_holds_have_a_weight_too():
    stream = mf.Batches.from_dataset(Squares(), batch_size=2, steps=1, generator=seeded())
    assert stream.size == 7
    found = mf.recipes.attribution(
        lambda p, batch: (p["w"] - batch["y"]) ** 2,
        lambda: {"w": torch.zeros(())},
        stream,
        {"y": torch.ones(1)},
        solver=mf.SGD(0.1, 1),
    )
    assert found.scores.shape == (1, 7)
    assert set(found.scores[0].nonzero()[:, 0].tolist()) <= set(stream.rows[0].tolist())
