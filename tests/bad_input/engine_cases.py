"""Bad input, one table: see catalogue.py."""

from __future__ import annotations

ENGINE = [
    (
        "outer is a module",
        "hypergrad(outer=nn.Linear(2, 2))",
        "ProblemError",
        (
            "outer must be a dict of tensors (outer parameters by name), got Linear. From a "
            "module: dict(module.named_parameters())."
        ),
    ),
    (
        "outer is a list",
        "hypergrad(outer=[torch.ones(2)])",
        "ProblemError",
        (
            "outer must be a dict of tensors (outer parameters by name), got list. From a "
            "module: dict(module.named_parameters())."
        ),
    ),
    (
        "outer holds integers",
        'hypergrad(outer={"w": torch.ones(2, dtype=torch.int64)})',
        "ProblemError",
        (
            "outer holds 'w' of dtype torch.int64; only floating-point tensors can be "
            "differentiated. Close over integer tensors, or put them into the episode."
        ),
    ),
    (
        "outer holds a number",
        'hypergrad(outer={"w": 1.0})',
        "ProblemError",
        "outer holds 'w' of type float; outer parameters are tensors.",
    ),
    (
        "outer is empty for an explicit estimator",
        "hypergrad(outer={}, estimator=mf.Implicit())",
        "ProblemError",
        (
            "outer={} with Implicit(solve=CG(steps=10, damping=0.0), hvp=hvp_reverse): this "
            "estimator differentiates explicit tensors only. Pass "
            "dict(model.named_parameters()) as outer (never state_dict(): tied names clash), "
            "or use Unrolled() or FirstOrder()."
        ),
    ),
    (
        "init returns nothing",
        "hypergrad(problem(init=lambda slow, support: None))",
        "ProblemError",
        (
            "init must be a dict of tensors (fast weights by name), got NoneType. From a "
            "module: dict(module.named_parameters())."
        ),
    ),
    (
        "init returns another name",
        'hypergrad(problem(init=lambda slow, support: {"v": slow["w"]}))',
        "ProblemError",
        (
            "inner_loss asks for 'w'; init returned ['v'] and outer holds ['w']. Return it "
            "from init, or correct the name."
        ),
    ),
    (
        "init returns a name that is never read",
        'hypergrad(problem(init=lambda slow, support: {**slow, "v": slow["w"]}))',
        "ProblemError",
        (
            "init returns 'v', which inner_loss never reads: it would never be adapted. "
            "Remove it from init, or use it. init returned ['v', 'w']."
        ),
    ),
    (
        "inner loss is a vector",
        'hypergrad(problem(inner=lambda fast, slow, x: fast["w"]))',
        "ProblemError",
        "inner_loss must return a scalar, got shape [2]. Reduce it: .mean().",
    ),
    (
        "inner loss is a number",
        "hypergrad(problem(inner=lambda fast, slow, x: 1.0))",
        "ProblemError",
        "inner_loss must return a scalar tensor, got float.",
    ),
    (
        "inner loss is an integer tensor",
        'hypergrad(problem(inner=lambda fast, slow, x: fast["w"].sum().long()))',
        "ProblemError",
        "inner_loss must return a floating-point scalar, got torch.int64.",
    ),
    (
        "inner loss is NaN",
        'hypergrad(problem(inner=lambda fast, slow, x: (fast["w"] * math.nan).sum()))',
        "NonFiniteError",
        (
            "inner_loss is nan before inner step 0. Lower the solver's lr, clip its "
            "gradients (clip=mf.clip_global(1.0)), or look at the support data."
        ),
    ),
    (
        "inner loss is infinite",
        'hypergrad(problem(inner=lambda fast, slow, x: (fast["w"] * math.inf).sum()))',
        "NonFiniteError",
        (
            "inner_loss is inf before inner step 0. Lower the solver's lr, clip its "
            "gradients (clip=mf.clip_global(1.0)), or look at the support data."
        ),
    ),
    (
        "inner loss explodes",
        "hypergrad(solver=mf.SGD(1e30, 3))",
        "NonFiniteError",
        (
            "inner_loss is inf before inner step 1. Lower the solver's lr, clip its "
            "gradients (clip=mf.clip_global(1.0)), or look at the support data."
        ),
    ),
    (
        "outer loss is a vector",
        'hypergrad(problem(outer=lambda fast, slow, x: fast["w"]))',
        "ProblemError",
        "outer_loss must return a scalar, got shape [2]. Reduce it: .mean().",
    ),
    (
        "outer loss is a number",
        'hypergrad(problem(outer=lambda fast, slow, x: fast["w"].sum().item()))',
        "ProblemError",
        "outer_loss must return a scalar tensor, got float.",
    ),
    (
        "loss closes over a tensor that requires grad",
        (
            "scale = torch.ones((), requires_grad=True)\n"
            "hypergrad(problem(inner=lambda fast, slow, x: scale * loss(fast, slow, x)), "
            "estimator=mf.Implicit())"
        ),
        "ClosureError",
        (
            "inner_loss closes over a tensor that requires grad and is not in outer: this "
            "estimator differentiates explicit tensors only and would treat it as a "
            "constant. Pass it in outer (from a module: dict(module.named_parameters())), "
            "freeze it with requires_grad_(False), or use Unrolled() without recompute."
        ),
    ),
    (
        "prepare returns nothing",
        "hypergrad(problem(prepare=lambda slow, episode: None))",
        "ProblemError",
        "prepare must return mf.Episode(support, query), got NoneType.",
    ),
    (
        "prepare returns a tensor",
        "hypergrad(problem(prepare=lambda slow, episode: torch.zeros(2)))",
        "ProblemError",
        "prepare must return mf.Episode(support, query), got Tensor of 2.",
    ),
    (
        "learning rate below zero",
        "mf.SGD(-0.1, steps=2)",
        "ValueError",
        "lr must be a number >= 0 or a function of the outer parameters, got -0.1.",
    ),
    (
        "learning rate NaN",
        "mf.SGD(math.nan, steps=2)",
        "ValueError",
        "lr must be a number >= 0 or a function of the outer parameters, got nan.",
    ),
    (
        "steps are no whole number",
        "mf.SGD(0.1, steps=2.0)",
        "ValueError",
        "steps must be an integer >= 0 (0: no adaptation), got 2.0.",
    ),
    (
        "steps below zero",
        "mf.Adam(0.1, steps=-1)",
        "ValueError",
        "steps must be an integer >= 0 (0: no adaptation), got -1.",
    ),
    (
        "steps are True",
        "mf.SGD(0.1, steps=True)",
        "ValueError",
        "steps must be an integer >= 0 (0: no adaptation), got True.",
    ),
    (
        "momentum of 1",
        "mf.SGD(0.1, steps=2, momentum=1.0)",
        "ValueError",
        "momentum must be in [0, 1), got 1.0.",
    ),
    (
        "Nesterov without momentum",
        "mf.SGD(0.1, steps=2, nesterov=True)",
        "ValueError",
        "nesterov=True needs momentum > 0, got momentum=0.0.",
    ),
    (
        "weight decay below zero",
        "mf.AdamW(0.1, steps=2, weight_decay=-1.0)",
        "ValueError",
        "weight_decay must be >= 0, got -1.0.",
    ),
    (
        "clip at zero",
        "mf.clip_per_tensor(0.0)",
        "ValueError",
        "limit must be positive, got 0.0.",
    ),
    (
        "learned rates for other names",
        'hypergrad(solver=mf.SGD(lambda outer: {"v": torch.tensor(0.1)}, 2))',
        "ProblemError",
        (
            "lr(outer) must return one rate for each fast weight; 'v' is on one side only. "
            "Fast weights: ['w']."
        ),
    ),
    (
        "learned rates of another shape",
        "hypergrad(solver=mf.SGD(lambda outer: torch.ones(5), 2))",
        "ProblemError",
        (
            "lr(outer) must return a scalar or a dict of rates, got shape [5]. One rate per "
            "step: mf.per_step(lambda outer, step: outer[name][step])."
        ),
    ),
    (
        "last below zero",
        "mf.Unrolled(last=-1)",
        "ValueError",
        "last must be an integer >= 0, got -1.",
    ),
    (
        "recompute is a word",
        'mf.Unrolled(recompute="yes")',
        "ValueError",
        "recompute must be an integer >= 0, got 'yes'.",
    ),
    (
        "finite difference of zero",
        "mf.hvp_finite(0.0)",
        "ValueError",
        "eps must be positive, got 0.0.",
    ),
    (
        "finite difference of infinity",
        "mf.hvp_finite(math.inf)",
        "ValueError",
        "eps must be finite, got inf.",
    ),
    (
        "no step of conjugate gradients",
        "mf.CG(0)",
        "ValueError",
        "steps must be an integer >= 1, got 0.",
    ),
    (
        "damping below zero",
        "mf.GMRES(5, damping=-1.0)",
        "ValueError",
        "damping must be >= 0, got -1.0.",
    ),
    (
        "damping infinite",
        "mf.CG(5, damping=math.inf)",
        "ValueError",
        "damping must be finite, got inf.",
    ),
    (
        "Neumann scale below zero",
        "mf.Neumann(5, scale=-1.0)",
        "ValueError",
        "scale must be positive, got -1.0.",
    ),
    (
        "Nystrom without damping",
        "mf.Nystrom(2, damping=0.0)",
        "ValueError",
        "damping must be positive, got 0.0.",
    ),
    (
        "implicit with weight decay",
        "hypergrad(solver=mf.SGD(0.1, 2, weight_decay=0.1), estimator=mf.Implicit())",
        "ProblemError",
        (
            "Implicit needs the minimum of inner_loss; weight_decay=0.1 moves the solver's "
            "fixed point away. Set weight_decay=0 and add the decay to inner_loss."
        ),
    ),
    (
        "warm start of another problem",
        (
            'start = mf.WarmStart(mf.CG(1), {"v": torch.ones(2)})\n'
            "hypergrad(solver=mf.SGD(0.5, 1), estimator=mf.Implicit(start))"
        ),
        "ProblemError",
        (
            "WarmStart: start has the shapes {'v': [2]}, the right-hand side {'w': [2]}. "
            "Pass what mf.adjoint returned for the same problem."
        ),
    ),
    (
        "adjoint of another shape",
        (
            'mf.adjoint(problem(), weights, weights, torch.zeros(2), {"w": torch.ones(3)}, '
            "solve=mf.CG(1))"
        ),
        "ProblemError",
        "cotangent has the shapes {'w': [3]}, fast has {'w': [2]}.",
    ),
    (
        "penalty of zero",
        "mf.Penalty(0.0)",
        "ValueError",
        "strength must be positive, got 0.0.",
    ),
    (
        "proximal strength below zero",
        "mf.proximal(loss, -1.0)",
        "ValueError",
        "strength must be >= 0, got -1.0.",
    ),
    (
        "proximal strength infinite",
        "mf.proximal(loss, math.inf)",
        "ValueError",
        "strength must be finite, got inf.",
    ),
    (
        "proximal without the slow weight",
        (
            'hypergrad(problem(inner=mf.proximal(loss, 1.0), init=lambda slow, support: {"w": '
            'slow["v"]}), outer={"v": torch.ones(2)})'
        ),
        "ProblemError",
        (
            "proximal pulls every fast weight to the slow weight of the same name; slow has "
            "no 'w'. Return those names from init."
        ),
    ),
    (
        "tasks mapped by an unknown way",
        'mf.over_tasks(meta_loss(), how="pmap")',
        "ValueError",
        'how must be "vmap" or "loop", got \'pmap\'.',
    ),
    (
        "tasks of different numbers",
        ("mf.over_tasks(meta_loss())(weights, mf.Episode(torch.zeros(3, 2), torch.zeros(4, 2)))"),
        "ProblemError",
        (
            "episodes must be stacked on axis 0, with one entry for each task in every "
            "tensor; got axis-0 sizes [3, 4]. Stack single episodes with "
            "torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *episodes)."
        ),
    ),
    (
        "no tasks",
        ("mf.over_tasks(meta_loss())(weights, mf.Episode(torch.zeros(0, 2), torch.zeros(0, 2)))"),
        "ProblemError",
        (
            "episodes must be stacked on axis 0, with one entry for each task in every "
            "tensor; got axis-0 sizes [0, 0]. Stack single episodes with "
            "torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *episodes)."
        ),
    ),
    (
        "chunks of no tasks",
        "mf.over_tasks(meta_loss(), chunk_size=0)",
        "ValueError",
        "chunk_size must be >= 1 or None, got 0.",
    ),
    (
        "comparison with nothing",
        (
            "mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), estimators={}, "
            "reference=mf.Unrolled())"
        ),
        "ProblemError",
        ("estimators must be a dict of at least one, such as {'full': mf.Unrolled()}, got {}."),
    ),
    (
        "comparison with a list",
        (
            "mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), "
            "estimators=[mf.FirstOrder()], reference=mf.Unrolled())"
        ),
        "ProblemError",
        (
            "estimators must be a dict of at least one, such as {'full': mf.Unrolled()}, got "
            "[Unrolled(last=0, recompute=False, hvp=hvp_reverse)]."
        ),
    ),
    (
        "comparison with an unknown reference",
        (
            'mf.compare(problem(), weights, zeros, solver=mf.SGD(0.1, 2), estimators={"a": '
            'mf.FirstOrder()}, reference="b")'
        ),
        "ProblemError",
        "reference 'b' is not one of the estimators ['a'].",
    ),
    (
        "comparison without outer parameters",
        (
            'mf.compare(problem(), {}, zeros, solver=mf.SGD(0.1, 2), estimators={"a": '
            'mf.FirstOrder()}, reference="a")'
        ),
        "ProblemError",
        ("compare needs explicit outer parameters, got {}. Pass dict(model.named_parameters())."),
    ),
    (
        "evolution without noise",
        "mf.algorithms.Evolution(meta_loss(), sigma=0.0, pairs=2, generator=torch.Generator())",
        "ValueError",
        "sigma must be positive, got 0.0.",
    ),
    (
        "evolution without a generator",
        "mf.algorithms.Evolution(meta_loss(), sigma=0.1, pairs=2, generator=None)(weights, zeros)",
        "ValueError",
        (
            "generator must be a torch.Generator, got NoneType. Randomness is explicit: "
            "generator=torch.Generator().manual_seed(0)."
        ),
    ),
    (
        "windows of no steps",
        "mf.algorithms.Windows(problem(), solver=mf.SGD(0.1, 0))",
        "ValueError",
        "solver.steps must be >= 1: it is the length of a window, got 0.",
    ),
    (
        "an inner loop under inference mode",
        ("with torch.inference_mode():\n    hypergrad()"),
        "TransformError",
        (
            "torch.inference_mode() has no gradients, so the inner loop would not adapt. Use "
            "torch.no_grad() instead."
        ),
    ),
    (
        "a given solution of another name",
        ('hypergrad(solver=mf.Given(lambda *args: {"v": torch.ones(2)}), estimator=mf.Implicit())'),
        "ProblemError",
        (
            "Given: solution and init must return the same names; 'v' is on one side only. "
            "init: ['w'], solution: ['v']."
        ),
    ),
    (
        "a single-loop algorithm without outer parameters",
        "mf.algorithms.SOBA(problem(), inner_lr=0.1, v_lr=0.1).init({})",
        "ProblemError",
        (
            "outer={} with a single-loop algorithm: it differentiates explicit tensors only. "
            "Pass dict(model.named_parameters()) as outer."
        ),
    ),
]
