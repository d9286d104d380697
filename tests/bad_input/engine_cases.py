"""Bad input to the engine: see catalogue.py for what the columns mean."""

from __future__ import annotations

ENGINE = [
    # outer
    (
        "outer is a module",
        "hypergrad(outer=nn.Linear(2, 2))",
        "ProblemError",
        "outer must be a dict of tensors … got Linear",
        "From a module: mf.trainable(module)",
    ),
    (
        "outer is a list",
        "hypergrad(outer=[torch.ones(2)])",
        "ProblemError",
        "outer must be a dict of tensors … got list",
        "From a module: mf.trainable(module)",
    ),
    (
        "outer of several tasks is a module",
        "mf.over_tasks(meta_loss())(nn.Linear(2, 2), stacked)",
        "ProblemError",
        "outer must be a dict of tensors … got Linear",
        "From a module: mf.trainable(module)",
    ),
    (
        "outer holds integers",
        'hypergrad(outer={"w": torch.ones(2, dtype=torch.int64)})',
        "ProblemError",
        "outer holds 'w' of dtype torch.int64",
        "Close over integer tensors, or put them into the episode",
    ),
    (
        "outer holds complex numbers",
        'hypergrad(outer={"w": torch.ones(2, dtype=torch.complex64)})',
        "ProblemError",
        "outer holds 'w' of dtype torch.complex64",
        "torch.view_as_real(x) … Data may be complex",
    ),
    (
        "complex fast weights",
        "hypergrad(problem(init=lambda slow, x: {'w': torch.zeros(2, dtype=torch.complex64)}))",
        "ProblemError",
        "init holds 'w' of dtype torch.complex64",
        "torch.view_as_real(x) … Data may be complex",
    ),
    (
        "outer holds a number",
        'hypergrad(outer={"w": 1.0})',
        "ProblemError",
        "outer holds 'w' of type float",
        "outer parameters are tensors",
    ),
    (
        "outer is empty for an explicit estimator",
        "hypergrad(outer={}, estimator=mf.Implicit())",
        "ProblemError",
        "outer={} with Implicit",
        "Pass mf.trainable(model) as outer … or use Unrolled() or FirstOrder()",
    ),
    (
        "nothing requires grad",
        'mf.over_tasks(meta_loss())({"w": torch.ones(2)}, stacked)',
        "ProblemError",
        "nothing in outer requires grad",
        "mf.trainable(model) … mf.hypergrad(meta_loss) … torch.no_grad()",
    ),
    (
        "every outer parameter is frozen",
        'hypergrad(outer={"w": nn.Parameter(torch.ones(2), requires_grad=False)})',
        "ProblemError",
        "Nothing is left to adapt … frozen",
        "requires_grad_(True) … or give Problem an init",
    ),
    # the problem
    (
        "init takes one argument",
        "mf.Problem(loss, loss, lambda slow: slow)",
        "ProblemError",
        "init must take two arguments",
        "lambda slow, support: … leave init out",
    ),
    (
        "init is dict",
        "mf.Problem(loss, loss, dict)",
        "ProblemError",
        "init must take two arguments",
        "For MAML leave init out",
    ),
    (
        "init returns nothing",
        "hypergrad(problem(init=lambda slow, support: None))",
        "ProblemError",
        "init must be a dict of tensors … got NoneType",
        "From a module: mf.trainable(module)",
    ),
    (
        "init returns another name",
        'hypergrad(problem(init=lambda slow, support: {"v": slow["w"]}))',
        "ProblemError",
        "inner_loss asks for 'w'; init returned ['v'] and outer holds ['w']",
        "Return it from init, or correct the name",
    ),
    (
        "init returns a name that is never read",
        'hypergrad(problem(init=lambda slow, support: {**slow, "v": slow["w"]}))',
        "ProblemError",
        "inner_loss does not depend on the fast weight 'v'",
        "Correct the name, use the weight, or leave it out of init",
    ),
    (
        "inner loss is a vector",
        'hypergrad(problem(inner=lambda fast, slow, x: fast["w"]))',
        "ProblemError",
        "inner_loss must return a scalar, got shape [2]",
        "Reduce it: .mean()",
    ),
    (
        "inner loss is a number",
        "hypergrad(problem(inner=lambda fast, slow, x: 1.0))",
        "ProblemError",
        "inner_loss … got float",
        "must return a scalar tensor",
    ),
    (
        "inner loss is an integer tensor",
        'hypergrad(problem(inner=lambda fast, slow, x: fast["w"].sum().long()))',
        "ProblemError",
        "inner_loss … got torch.int64",
        "must return a floating-point scalar",
    ),
    (
        "inner loss is NaN",
        'hypergrad(problem(inner=lambda fast, slow, x: (fast["w"] * math.nan).sum()))',
        "NonFiniteError",
        "inner_loss is nan before inner step 0",
        "Lower the solver's lr, clip its gradients (clip=mf.clip_global(1.0)), or look at the "
        "support data",
    ),
    (
        "inner loss is infinite",
        'hypergrad(problem(inner=lambda fast, slow, x: (fast["w"] * math.inf).sum()))',
        "NonFiniteError",
        "inner_loss is inf before inner step 0",
        "Lower the solver's lr … clip … look at the support data",
    ),
    (
        "inner loss explodes",
        "hypergrad(solver=mf.SGD(1e30, 3))",
        "NonFiniteError",
        "inner_loss is inf before inner step 1",
        "Lower the solver's lr … clip … look at the support data",
    ),
    (
        "inner loss writes to its data",
        "hypergrad(problem(inner=lambda fast, slow, x: loss(fast, slow, x.mul_(2))))",
        "ProblemError",
        "inner_loss changes the support in place",
        "return new tensors … or clone first",
    ),
    (
        "inner loss counts its calls in a tensor",
        (
            "count = torch.zeros(())\n"
            "hypergrad(problem(inner=lambda fast, slow, x: loss(fast, slow, x + count.add_(1))))"
        ),
        "ProblemError",
        "inner_loss changes … count … hidden state",
        "Call eval() on that module … or pass the state through the fast weights",
    ),
    (
        "outer loss is a vector",
        'hypergrad(problem(outer=lambda fast, slow, x: fast["w"]))',
        "ProblemError",
        "outer_loss must return a scalar, got shape [2]",
        "Reduce it: .mean()",
    ),
    (
        "outer loss is a number",
        'hypergrad(problem(outer=lambda fast, slow, x: fast["w"].sum().item()))',
        "ProblemError",
        "outer_loss … got float",
        "must return a scalar tensor",
    ),
    (
        "outer loss ignores the fast weights",
        'hypergrad(problem(outer=lambda fast, slow, x: (slow["w"] ** 2).sum()))',
        "ProblemError",
        "outer_loss depends on none of the fast weights ['w']",
        "Use fast in it … functional_call(net, fast, (x,))",
    ),
    (
        "a metric is a word",
        'hypergrad(problem(outer=lambda *args: (loss(*args), {"note": "good"})))',
        "ProblemError",
        "the metric 'note' of type str",
        "metrics are numbers or tensors",
    ),
    (
        "loss closes over a tensor that requires grad",
        (
            "scale = torch.ones((), requires_grad=True)\n"
            "hypergrad(problem(inner=lambda fast, slow, x: scale * loss(fast, slow, x)), "
            "estimator=mf.Implicit())"
        ),
        "ClosureError",
        "inner_loss closes over a tensor that requires grad and is not in outer",
        "Pass it in outer … mf.trainable(module) … freeze it with requires_grad_(False), or use "
        "Unrolled() without recompute",
    ),
    (
        "prepare returns nothing",
        "hypergrad(problem(prepare=lambda slow, episode: None))",
        "ProblemError",
        "prepare … got NoneType",
        "must return mf.Episode(support, query)",
    ),
    (
        "prepare returns a tensor",
        "hypergrad(problem(prepare=lambda slow, episode: torch.zeros(2)))",
        "ProblemError",
        "prepare … got Tensor of 2",
        "must return mf.Episode(support, query)",
    ),
    (
        "a list of episodes",
        "hypergrad(episode=[zeros, zeros])",
        "ProblemError",
        "episode is a list of 2 episodes",
        "mf.stack_episodes … mf.over_tasks",
    ),
    (
        "the inner loss is a class",
        "hypergrad(problem(nn.MSELoss))",
        "ProblemError",
        "inner_loss … got the class MSELoss",
        "must be a function (fast, slow, data) -> scalar",
    ),
    (
        "the inner loss is a module that compares two tensors",
        "hypergrad(problem(nn.MSELoss()))",
        "ProblemError",
        "inner_loss … got MSELoss, which takes other arguments",
        "must be a function (fast, slow, data) -> scalar",
    ),
    (
        "the outer loss is a name",
        "hypergrad(problem(outer='mse'))",
        "ProblemError",
        "outer_loss … got 'mse'",
        "must be a function (fast, slow, data) -> scalar",
    ),
    (
        "prepare is a name",
        "hypergrad(problem(prepare='tokenise'))",
        "ProblemError",
        "prepare … got 'tokenise'",
        "must be a function (slow, episode) -> episode",
    ),
    (
        "the problem is a loss",
        "mf.bilevel(loss, solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())",
        "ProblemError",
        "problem … got function",
        "must be an mf.Problem(inner_loss, outer_loss)",
    ),
    (
        "outer is a state_dict",
        "meta_loss()(nn.ParameterDict(weights).state_dict(), zeros)",
        "ProblemError",
        "nothing in outer requires grad … state_dict()",
        "Pass mf.trainable(model)",
    ),
    (
        "dropout over tasks",
        "mf.hypergrad(mf.over_tasks(dropout()))(weights, stacked)",
        "TransformError",
        "draws random numbers",
        'randomness="different" … randomness="same"',
    ),
    # solvers
    (
        "the solver is an optimiser of torch",
        "hypergrad(solver=torch.optim.SGD([torch.ones(2)], lr=0.1))",
        "ProblemError",
        "solver must have steps, init and update … got SGD",
        "mf.SGD, mf.Adam, mf.AdamW, mf.Muon",
    ),
    (
        "the solver is a class",
        "hypergrad(solver=mf.SGD)",
        "ProblemError",
        "solver must be an object, got the class SGD",
        "write mf.SGD(0.1, steps=5)",
    ),
    (
        "the solver is a class of torch",
        "hypergrad(solver=torch.optim.SGD)",
        "ProblemError",
        "solver must be an object, got the class SGD",
        "write mf.SGD(0.1, steps=5)",
    ),
    (
        "the solver is a name",
        "hypergrad(solver='sgd')",
        "ProblemError",
        "solver must have steps, init and update … got str",
        "mf.SGD, mf.Adam, mf.AdamW, mf.Muon",
    ),
    (
        "solver and estimator are exchanged",
        "hypergrad(solver=mf.Unrolled(), estimator=mf.SGD(0.1, 2))",
        "ProblemError",
        "solver must have steps, init and update … got Unrolled",
        "mf.SGD, mf.Adam, mf.AdamW, mf.Muon",
    ),
    (
        "adaptation by an estimator",
        "mf.adapt(problem(), weights, torch.zeros(2), solver=mf.Unrolled())",
        "ProblemError",
        "solver must have steps, init and update … got Unrolled",
        "mf.SGD, mf.Adam, mf.AdamW, mf.Muon",
    ),
    (
        "an update that returns one value",
        "hypergrad(solver=descent(lambda params, grads: params))",
        "ProblemError",
        "update … got dict",
        "must return (fast weights, state)",
    ),
    (
        "an update that drops a fast weight",
        "hypergrad(solver=descent(lambda params, grads: ({}, None)))",
        "ProblemError",
        "'w'",
        "update must return every fast weight",
    ),
    (
        "an update in place",
        "hypergrad(solver=descent(lambda params, grads: ({'w': params['w'].sub_(1)}, None)))",
        "ProblemError",
        "solver.update changes … in place",
        "return new tensors",
    ),
    (
        "a given solution that is a dict",
        "mf.Given({'w': torch.zeros(2)})",
        "ProblemError",
        "solution … got dict",
        "write mf.Given(lambda slow, support: fast)",
    ),
    (
        "learning rate below zero",
        "mf.SGD(-0.1, steps=2)",
        "ValueError",
        "lr … got -0.1",
        "must be a number >= 0 or a function of the outer parameters",
    ),
    (
        "learning rate NaN",
        "mf.SGD(math.nan, steps=2)",
        "ValueError",
        "lr … got nan",
        "must be a number >= 0 or a function of the outer parameters",
    ),
    (
        "steps are no whole number",
        "mf.SGD(0.1, steps=2.0)",
        "ValueError",
        "steps … got 2.0",
        "must be an integer >= 0 (0: no adaptation)",
    ),
    (
        "steps below zero",
        "mf.Adam(0.1, steps=-1)",
        "ValueError",
        "steps … got -1",
        "must be an integer >= 0 (0: no adaptation)",
    ),
    (
        "steps are True",
        "mf.SGD(0.1, steps=True)",
        "ValueError",
        "steps … got True",
        "must be an integer >= 0 (0: no adaptation)",
    ),
    (
        "momentum of 1",
        "mf.SGD(0.1, steps=2, momentum=1.0)",
        "ValueError",
        "momentum … got 1.0",
        "must be in [0, 1)",
    ),
    (
        "Nesterov without momentum",
        "mf.SGD(0.1, steps=2, nesterov=True)",
        "ValueError",
        "nesterov=True … got momentum=0.0",
        "needs momentum > 0",
    ),
    (
        "weight decay below zero",
        "mf.AdamW(0.1, steps=2, weight_decay=-1.0)",
        "ValueError",
        "weight_decay … got -1.0",
        "must be >= 0",
    ),
    (
        "clip at zero",
        "mf.clip_per_tensor(0.0)",
        "ValueError",
        "limit … got 0.0",
        "must be positive",
    ),
    (
        "learned rates for other names",
        'hypergrad(solver=mf.SGD(lambda outer: {"v": torch.tensor(0.1)}, 2))',
        "ProblemError",
        "'v' is on one side only … ['w']",
        "lr(outer) must return one rate for each fast weight",
    ),
    (
        "learned rates of another shape",
        "hypergrad(solver=mf.SGD(lambda outer: torch.ones(5), 2))",
        "ProblemError",
        "lr(outer) must return a scalar or a dict of rates, got shape [5]",
        "One rate per step: mf.per_step",
    ),
    (
        "a given solution of another name",
        'hypergrad(solver=mf.Given(lambda *args: {"v": torch.ones(2)}), estimator=mf.Implicit())',
        "ProblemError",
        "Given … 'v' is on one side only. init: ['w'], solution: ['v']",
        "solution and init must return the same names",
    ),
    (
        "unrolling a given solution",
        'hypergrad(solver=mf.Given(lambda *args: {"w": torch.ones(2)}))',
        "ProblemError",
        "Given … has no inner steps to differentiate",
        "Use Implicit, FixedPoint or Penalty, or a solver such as SGD",
    ),
    # estimators
    (
        "the estimator is a class",
        "hypergrad(estimator=mf.Unrolled)",
        "ProblemError",
        "estimator must be an object, got the class Unrolled",
        "write mf.Unrolled()",
    ),
    (
        "the estimator is a name",
        "hypergrad(estimator='maml')",
        "ProblemError",
        "estimator … got 'maml'",
        "such as mf.Unrolled()",
    ),
    (
        "an estimator that returns a dict",
        "hypergrad(estimator=lambda loss, solver, start, *rest: start)",
        "ProblemError",
        "got dict",
        "must return mf.Solution(params, losses)",
    ),
    (
        "an estimator that drops a fast weight",
        "hypergrad(estimator=lambda *args: mf.Solution({}, torch.zeros(2)))",
        "ProblemError",
        "got []",
        "must return every fast weight",
    ),
    (
        "a linear solver by its name",
        "mf.Implicit('cg')",
        "ProblemError",
        "solve … got 'cg'",
        "such as mf.CG(10)",
    ),
    (
        "a linear solver's class",
        "mf.Implicit(mf.CG)",
        "ProblemError",
        "solve … got the class CG",
        "such as mf.CG(10)",
    ),
    (
        "the function that makes a finite difference",
        "mf.Unrolled(hvp=mf.hvp_finite)",
        "ProblemError",
        "hvp … got hvp_finite, which takes other arguments",
        "mf.hvp_finite()",
    ),
    (
        "the hypergradient of a problem",
        "mf.hypergrad(problem())",
        "ProblemError",
        "meta_loss … got Problem",
        "such as mf.bilevel returns",
    ),
    (
        "a problem over tasks",
        "mf.over_tasks(problem())",
        "ProblemError",
        "meta_loss … got Problem",
        "such as mf.bilevel returns",
    ),
    (
        "last below zero",
        "mf.Unrolled(last=-1)",
        "ValueError",
        "last … got -1",
        "must be an integer >= 0",
    ),
    (
        "recompute is a word",
        'mf.Unrolled(recompute="yes")',
        "ValueError",
        "recompute … got 'yes'",
        "must be an integer >= 0",
    ),
    (
        "finite difference of zero",
        "mf.hvp_finite(0.0)",
        "ValueError",
        "eps … got 0.0",
        "must be positive",
    ),
    (
        "finite difference of infinity",
        "mf.hvp_finite(math.inf)",
        "ValueError",
        "eps … got inf",
        "must be finite",
    ),
    (
        "no step of conjugate gradients",
        "mf.CG(0)",
        "ValueError",
        "steps … got 0",
        "must be an integer >= 1",
    ),
    (
        "damping below zero",
        "mf.GMRES(5, damping=-1.0)",
        "ValueError",
        "damping … got -1.0",
        "must be >= 0",
    ),
    (
        "damping infinite",
        "mf.CG(5, damping=math.inf)",
        "ValueError",
        "damping … got inf",
        "must be finite",
    ),
    (
        "Neumann scale below zero",
        "mf.Neumann(5, scale=-1.0)",
        "ValueError",
        "scale … got -1.0",
        "must be positive",
    ),
    (
        "Nystrom without damping",
        "mf.Nystrom(2, damping=0.0)",
        "ValueError",
        "damping … got 0.0",
        "must be positive",
    ),
    (
        "implicit with weight decay",
        "hypergrad(solver=mf.SGD(0.1, 2, weight_decay=0.1), estimator=mf.Implicit())",
        "ProblemError",
        "weight_decay=0.1 moves the solver's fixed point",
        "Set weight_decay=0 and add the decay to inner_loss",
    ),
    (
        "warm start of another problem",
        (
            'start = mf.WarmStart(mf.CG(1), {"v": torch.ones(2)})\n'
            "hypergrad(solver=mf.SGD(0.5, 1), estimator=mf.Implicit(start))"
        ),
        "ProblemError",
        "WarmStart: start has the shapes {'v': [2]}, the right-hand side {'w': [2]}",
        "Pass what mf.adjoint returned for the same problem",
    ),
    (
        "adjoint of another shape",
        (
            'mf.adjoint(problem(), weights, weights, torch.zeros(2), {"w": torch.ones(3)}, '
            "solve=mf.CG(1))"
        ),
        "ProblemError",
        "cotangent has the shapes {'w': [3]}",
        "fast has {'w': [2]}",
    ),
    (
        "penalty of zero",
        "mf.Penalty(0.0)",
        "ValueError",
        "strength … got 0.0",
        "must be positive",
    ),
    (
        "proximal strength below zero",
        "mf.proximal(loss, -1.0)",
        "ValueError",
        "strength … got -1.0",
        "must be >= 0",
    ),
    (
        "proximal strength infinite",
        "mf.proximal(loss, math.inf)",
        "ValueError",
        "strength … got inf",
        "must be finite",
    ),
    (
        "proximal without the slow weight",
        (
            'hypergrad(problem(inner=mf.proximal(loss, 1.0), init=lambda slow, support: {"w": '
            'slow["v"]}), outer={"v": torch.ones(2)})'
        ),
        "ProblemError",
        "proximal … slow has no 'w'",
        "Return those names from init",
    ),
    (
        "an inner loop under inference mode",
        "with torch.inference_mode():\n    hypergrad()",
        "TransformError",
        "torch.inference_mode() has no gradients",
        "Use torch.no_grad()",
    ),
    # streams and paths
    (
        "fewer slices than steps",
        "hypergrad(episode=mf.Episode(mf.PerStep(torch.zeros(1, 2)), torch.zeros(2)))",
        "ProblemError",
        "PerStep has no data for inner step 1",
        "Give one slice for each step, or take fewer steps",
    ),
    (
        "implicit on a stream",
        (
            "hypergrad(episode=mf.Episode(mf.PerStep(torch.zeros(2, 2)), torch.zeros(2)), "
            "estimator=mf.Implicit())"
        ),
        "ProblemError",
        "Implicit … needs one support; the support is a stream",
        "Pass data=, a function from the stream to the data … or use Unrolled",
    ),
    (
        "batches of a loader",
        "mf.Batches.from_dataset(torch.utils.data.DataLoader([1]), batch_size=1, steps=1, "
        "generator=torch.Generator())",
        "ProblemError",
        "dataset must be map-style",
        "Use mf.Batches.from_dataset(loader.dataset",
    ),
    (
        "batches of an iterator",
        "mf.Batches.from_dataset(iter([1]), batch_size=1, steps=1, generator=torch.Generator())",
        "ProblemError",
        "dataset must be map-style",
        "Write an iterable data set to a list or a file first",
    ),
    (
        "sharing what is no stream",
        "mf.shared(torch.zeros(2))",
        "ProblemError",
        "shared … got Tensor",
        "needs a stream, an object with .at(step)",
    ),
    (
        "a path of another length",
        "hypergrad(path=[1.0])",
        "ProblemError",
        "got shape [1]",
        "path must give one weight for each of the 2 inner steps",
    ),
    (
        "a path of an estimator that has none",
        "hypergrad(path=[0.5, 0.5], estimator=mf.Implicit())",
        "ProblemError",
        "path= needs the fast weights after every step … Implicit",
        "Use Unrolled, FirstOrder or EvoGrad",
    ),
    # tasks
    (
        "tasks mapped by an unknown way",
        'mf.over_tasks(meta_loss(), how="pmap")',
        "ValueError",
        "how … got 'pmap'",
        "must be 'vmap' or 'loop'",
    ),
    (
        "tasks of different numbers",
        "mf.over_tasks(meta_loss())(weights, mf.Episode(torch.zeros(3, 2), torch.zeros(4, 2)))",
        "ProblemError",
        "episodes must be stacked on axis 0 … got axis-0 sizes [3, 4]",
        "Stack single episodes with mf.stack_episodes(episodes)",
    ),
    (
        "no tasks",
        "mf.over_tasks(meta_loss())(weights, mf.Episode(torch.zeros(0, 2), torch.zeros(0, 2)))",
        "ProblemError",
        "episodes must be stacked on axis 0 … got axis-0 sizes [0, 0]",
        "Stack single episodes with mf.stack_episodes(episodes)",
    ),
    (
        "chunks of no tasks",
        "mf.over_tasks(meta_loss(), chunk_size=0)",
        "ValueError",
        "chunk_size … got 0",
        'must be an integer >= 1, "auto" or None',
    ),
    (
        "a stream over tasks that is not shared",
        (
            "batches = mf.Batches(lambda step: torch.zeros(2), steps=2)\n"
            "mf.over_tasks(meta_loss())(weights, mf.Episode(batches, torch.zeros(3, 2)))"
        ),
        "ProblemError",
        "a stream of type Batches cannot be stacked over tasks",
        "mf.shared(stream) … or stack mf.PerStep of each task",
    ),
    # comparison
    (
        "comparison with nothing",
        (
            "mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), estimators={}, "
            "reference=mf.Unrolled())"
        ),
        "ProblemError",
        "estimators … got {}",
        "must be a dict of at least one, such as {'full': mf.Unrolled()}",
    ),
    (
        "comparison with a list",
        (
            "mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), "
            "estimators=[mf.FirstOrder()], reference=mf.Unrolled())"
        ),
        "ProblemError",
        "estimators … got [FirstOrder()]",
        "must be a dict of at least one, such as {'full': mf.Unrolled()}",
    ),
    (
        "comparison with an unknown reference",
        (
            'mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), estimators={"a": '
            'mf.FirstOrder()}, reference="b")'
        ),
        "ProblemError",
        "reference 'b'",
        "one of the estimators ['a']",
    ),
    (
        "comparison without outer parameters",
        (
            'mf.compare(problem(), {}, zeros, solver=mf.SGD(0.1, 2), estimators={"a": '
            'mf.FirstOrder()}, reference="a")'
        ),
        "ProblemError",
        "outer={} with compare",
        "Pass mf.trainable(model)",
    ),
    # algorithms
    (
        "evolution without noise",
        "mf.algorithms.Evolution(meta_loss(), sigma=0.0, pairs=2, generator=torch.Generator())",
        "ValueError",
        "sigma … got 0.0",
        "must be positive",
    ),
    (
        "evolution without a generator",
        "mf.algorithms.Evolution(meta_loss(), sigma=0.1, pairs=2, generator=None)(weights, zeros)",
        "ValueError",
        "generator must be a torch.Generator, got NoneType",
        "generator=torch.Generator().manual_seed(0)",
    ),
    (
        "windows of no steps",
        "mf.algorithms.Windows(problem(), solver=mf.SGD(0.1, 0))",
        "ValueError",
        "solver.steps … got 0",
        "must be an integer >= 1 (the length of a window)",
    ),
    (
        "a single-loop algorithm without outer parameters",
        "mf.algorithms.SOBA(problem(), inner_lr=0.1, v_lr=0.1).init({})",
        "ProblemError",
        "outer={} with a single-loop algorithm",
        "Pass mf.trainable(model) as outer",
    ),
    # what a newcomer typed
    (
        "a learning rate as a string",
        'mf.SGD("0.05", steps=3)',
        "ValueError",
        "lr … got '0.05'",
        "must be a number >= 0 or a function of the outer parameters",
    ),
    (
        "no momentum as None",
        "mf.SGD(0.1, 3, momentum=None)",
        "ValueError",
        "momentum … got None",
        "must be a number in [0, 1)",
    ),
    (
        "a limit in place of a clipping function",
        "mf.SGD(0.1, 3, clip=1.0)",
        "ProblemError",
        "clip … got float",
        "mf.clip_global(1.0)",
    ),
    (
        "a loss that no gradient flows through",
        "hypergrad(problem(lambda f, s, x: torch.tensor(loss(f, s, x).item())))",
        "ProblemError",
        "inner_loss does not depend on the fast weights ['w']",
        "Use fast in it … no_grad(), detach(), .item() and NumPy cut the derivative",
    ),
    (
        "a loss that writes to its weights",
        'hypergrad(problem(lambda f, s, x: (f["w"].add_(1) - x).square().sum()))',
        "ProblemError",
        "inner_loss changes the fast weight 'w' in place",
        "return new tensors",
    ),
    (
        "a loss that calls backward",
        "def eager(f, s, x):\n"
        "    value = loss(f, s, x)\n"
        "    value.backward()\n"
        "    return value\n"
        "hypergrad(problem(eager))",
        "ProblemError",
        "inner_loss calls backward()",
        "Return the loss only",
    ),
    (
        "an episode of NumPy arrays",
        "def linear(f, s, x):\n"
        '    return nn.functional.linear(x, f["w"]).sum()\n'
        "hypergrad(problem(linear), episode=(torch.zeros(2).numpy(), torch.zeros(2)))",
        "ProblemError",
        "the support holds NumPy arrays",
        "torch.from_numpy",
    ),
    (
        "an episode of lists",
        "def linear(f, s, x):\n"
        '    return nn.functional.linear(x, f["w"]).sum()\n'
        "hypergrad(problem(linear), episode=([0.0, 1.0], torch.zeros(2)))",
        "ProblemError",
        "the support holds lists of numbers",
        "torch.tensor(x)",
    ),
    (
        "a model in half precision on data in single",
        "half = nn.Linear(2, 1).half()\n"
        "def predicts(f, s, x):\n"
        "    return torch.func.functional_call(half, f, (x,)).square().sum()\n"
        "hypergrad(problem(predicts), outer=mf.trainable(half))",
        "ProblemError",
        "the support is torch.float32 where the fast weights are torch.float16",
        "convert one, as in x.to(torch.float16)",
    ),
    (
        "the parameters of a module in place of the module",
        "mf.trainable(nn.Linear(2, 1).parameters())",
        "ProblemError",
        "module must be a torch.nn.Module, got generator",
        "mf.trainable(net)",
    ),
    (
        "adaptation to a whole episode",
        "mf.adapt(problem(), weights, zeros, solver=mf.SGD(0.1, 2))",
        "ProblemError",
        "support … got an mf.Episode",
        "pass episode.support",
    ),
    (
        "an estimator that forgets the support",
        "hypergrad(estimator=lambda inner, solver, start, outer: None)",
        "ProblemError",
        "estimator … got <lambda>, which takes other arguments",
        "(inner_loss, solver, start, outer, support) -> mf.Solution",
    ),
    (
        "an estimator that returns constants",
        "hypergrad(estimator=lambda *given: mf.solve_inner(*given))",
        "ProblemError",
        "<lambda> returned constants … the hypergradient would be zero",
        "tie them to the start … v + (start[k] - start[k].detach())",
    ),
    (
        "an estimator whose losses are a list",
        "hypergrad(estimator=lambda *given: mf.Solution(given[2], [1.0]))",
        "ProblemError",
        "the inner losses of mf.Solution as a tensor, got list",
        "torch.stack(losses)",
    ),
    (
        "an estimator without a call",
        "class Empty(mf.Estimator):\n    pass\nhypergrad(estimator=Empty())",
        "ProblemError",
        "Empty must define",
        "__call__(self, inner_loss, solver, start, outer, support)",
    ),
    (
        "a comparison of classes",
        "mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), "
        "estimators={'mine': mf.Unrolled}, reference='mine')",
        "ProblemError",
        "estimators['mine'] … got the class Unrolled",
        "write mf.Unrolled()",
    ),
    (
        "a comparison on a module",
        "mf.compare(problem(), nn.Linear(2, 1), zeros, solver=mf.SGD(0.1, 2), "
        "estimators={'exact': mf.Unrolled()}, reference='exact')",
        "ProblemError",
        "outer must hold tensors, got a module",
        "mf.trainable(module)",
    ),
    (
        "weights that take no seed",
        "mf.compare(problem(), lambda: weights, zeros, solver=mf.SGD(0.1, 2), "
        "estimators={'exact': mf.Unrolled()}, reference='exact')",
        "ProblemError",
        "outer must be a function of the seed … which takes other arguments",
        "lambda seed: ...",
    ),
    (
        "a start that is cut off the slow weights",
        "def cut(slow, support):\n"
        "    return {k: v.detach().clone() for k, v in slow.items()}\n"
        "leaves = {'w': torch.ones(2, requires_grad=True)}\n"
        "mf.bilevel(problem(init=cut), solver=mf.SGD(0.1, 2), estimator=mf.Unrolled())"
        "(leaves, zeros)",
        "ProblemError",
        "depends on nothing in outer, so loss.backward() would train nothing",
        "Do not detach the slow weights in init (write v.clone()",
    ),
    (
        "names that are numbers",
        "hypergrad(problem(init=lambda slow, x: {0: slow['w']}))",
        "ProblemError",
        "init holds the key 0 of type int",
        "names are texts",
    ),
    (
        "adaptation of a meta loss",
        "mf.adapt(meta_loss(), weights, zeros.support, solver=mf.SGD(0.1, 2))",
        "ProblemError",
        "problem … got",
        "must be an mf.Problem(inner_loss, outer_loss)",
    ),
    (
        "one episode in place of many",
        "mf.stack_episodes(zeros)",
        "ProblemError",
        "episodes is one mf.Episode, whose support and query would be stacked on each other",
        "write mf.stack_episodes([episode])",
    ),
    (
        "the hypergradient of a hypergradient",
        "mf.hypergrad(mf.hypergrad(meta_loss()))(weights, zeros)",
        "ProblemError",
        "got dict",
        "meta_loss must return a scalar tensor",
    ),
    (
        "a query in another precision",
        "net = nn.Linear(2, 1)\n"
        "def predicts(f, s, x):\n"
        "    return torch.func.functional_call(net, f, (x,)).square().sum()\n"
        "mixed = mf.Episode(torch.zeros(2), torch.zeros(2).double())\n"
        "hypergrad(problem(predicts, predicts), outer=mf.trainable(net), episode=mixed)",
        "ProblemError",
        "the query is torch.float64 where the fast weights are torch.float32",
        "convert one, as in x.to(torch.float32)",
    ),
]
