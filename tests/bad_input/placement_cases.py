"""Bad input, one table: see catalogue.py for what the columns mean."""

from __future__ import annotations

ADAPTERS = [
    (
        "layer fraction is a number of layers",
        'mf.top_layers(4, ("up_proj",))',
        "PlacementError",
        "top_layers(fraction=4)",
        "must lie in [0, 1]: it is the share of layers, not their number",
    ),
    (
        "layer fraction is a word",
        'mf.top_layers("0.5", ("up_proj",))',
        "PlacementError",
        "top_layers(fraction='0.5')",
        "must lie in [0, 1]: it is the share of layers",
    ),
    (
        "layer fraction is True",
        'mf.top_layers(True, ("up_proj",))',
        "PlacementError",
        "top_layers(fraction=True)",
        "must lie in [0, 1]: it is the share of layers",
    ),
    (
        "layer fraction is NaN",
        'mf.top_layers(math.nan, ("up_proj",))',
        "PlacementError",
        "top_layers(fraction=nan)",
        "must lie in [0, 1]: it is the share of layers",
    ),
    (
        "names are one string",
        'mf.top_layers(0.5, "up_proj")',
        "PlacementError",
        "top_layers(names='up_proj')",
        "must be a non-empty tuple of module names, such as ('gate_proj', 'up_proj')",
    ),
    (
        "no names",
        "mf.top_layers(0.5, ())",
        "PlacementError",
        "top_layers(names=())",
        "must be a non-empty tuple of module names",
    ),
    (
        "a name that no layer has",
        'mf.top_layers(0.5, ("gate",))(model())',
        "PlacementError",
        "no module in a layer of Qwen2ForCausalLM is named ['gate']",
        "its linear modules are … 'mlp.gate_proj'",
    ),
    (
        "a model without layers",
        'mf.top_layers(0.5, ("0",))(linear)',
        "PlacementError",
        "no module in a layer of Sequential is named ['0']",
        "its linear modules are ['0', '2']",
    ),
    (
        "a pattern that is not a regular expression",
        'mf.matching("(")',
        "PlacementError",
        "matching('(') is not a regular expression",
        "missing )",
    ),
    (
        "a pattern of no type",
        "mf.matching(None)",
        "PlacementError",
        "matching(None) is not a regular expression",
        "must be string or compiled pattern",
    ),
    (
        "a pattern that matches nothing",
        'mf.matching("up_proj")(linear)',
        "PlacementError",
        "matching('up_proj') matches the whole path of no linear module",
        "paths are like ['0', '2']",
    ),
    (
        "no linear module",
        "mf.all_linear(nn.Sequential(nn.Tanh()))",
        "PlacementError",
        "all_linear: Sequential has no linear module",
        "(give a model with linear layers, or mf.FullWeights)",
    ),
    (
        "placement is a name",
        'mf.LoRA("up_proj")',
        "PlacementError",
        "LoRA(where='up_proj') must be a placement",
        "such as top_layers(0.35, ('up_proj',)) or matching('.*up_proj')",
    ),
    (
        "placement is a tuple of names",
        'mf.FullWeights(("up_proj",))',
        "PlacementError",
        "FullWeights(where=('up_proj',)) must be a placement",
        "such as top_layers(0.35, ('up_proj',)) or matching('.*up_proj')",
    ),
    (
        "placement returns one string",
        ('place = mf.LoRA(lambda model: "10")\nplace.init(linear)'),
        "PlacementError",
        "LoRA: the placement returned '10'",
        "must return a tuple of module paths",
    ),
    (
        "placement returns nothing",
        "mf.LoRA(lambda model: None).init(linear)",
        "PlacementError",
        "LoRA: the placement returned None",
        "must return a tuple of module paths",
    ),
    (
        "a module that cannot be adapted",
        'mf.LoRA(mf.top_layers(0.25, ("input_layernorm",))).init(model())',
        "PlacementError",
        "'model.layers.3.input_layernorm' is a Qwen2RMSNorm, which cannot be adapted",
        "place LoRA on linear layers",
    ),
    (
        "rank of zero",
        "mf.LoRA(mf.all_linear, rank=0)",
        "ProblemError",
        "LoRA: rank … got 0",
        "must be an integer >= 1",
    ),
    (
        "rank is no whole number",
        "mf.LoRA(mf.all_linear, rank=8.0)",
        "ProblemError",
        "LoRA: rank … got 8.0",
        "must be an integer >= 1",
    ),
    (
        "rank that fills the memory",
        "mf.LoRA(mf.all_linear, rank=1_000_000_000)",
        "ProblemError",
        "LoRA(rank=1000000000)",
        "must be at most 65536: no layer is that wide",
    ),
    (
        "alpha NaN",
        "mf.LoRA(mf.all_linear, alpha=math.nan)",
        "ProblemError",
        "LoRA: alpha … got nan",
        "must be a finite number",
    ),
    (
        "alpha is a word",
        'mf.LoRA(mf.all_linear, alpha="64")',
        "ProblemError",
        "LoRA: alpha … got '64'",
        "must be a finite number",
    ),
    (
        "fast weights of another model",
        ("with lora.bind(model(), mf.LoRA(mf.all_linear, rank=1).init(linear)):\n    pass"),
        "ProblemError",
        (
            "fast weights of another model or placement: missing "
            "['model.layers.2.mlp.up_proj.lora_A' … unknown ['0.lora_A'"
        ),
        "make them with init(model) of this adapter",
    ),
    (
        "fast weights are a list",
        ("with lora.bind(model(), [torch.ones(2)]):\n    pass"),
        "ProblemError",
        "LoRA: fast weights … got list",
        "make them with init(model)",
    ),
    (
        "fast weights are integers",
        (
            "fast = {name: value.long() for name, value in lora.init(model()).items()}\n"
            "with lora.bind(model(), fast):\n"
            "    pass"
        ),
        "ProblemError",
        "'model.layers.2.mlp.up_proj.lora_A' is a torch.int64",
        "fast weights are floating-point tensors",
    ),
    (
        "fast weights of another rank",
        ("with lora.bind(model(), mf.LoRA(lora.where, rank=3).init(model())):\n    pass"),
        "ProblemError",
        "lora_A' has shape [3, 32]",
        "expected [2, 32], or that behind the number of examples",
    ),
    (
        "fast weights for three rows and a batch of two",
        (
            "from metafocus.adapters import for_each\n"
            "lm = mf.lm_loss(model(), adapter=lora, mask=masks.causal)\n"
            "lm(for_each(lora.init(model()), 3), {}, batch())"
        ),
        "ProblemError",
        "fast weights for each of 3 examples, but its input has shape [2, 12, 32]",
        "bind fast weights made for this batch, and only on modules that see whole sequences",
    ),
    (
        "a PEFT configuration as a dict",
        'mf.LoRA.from_peft({"r": 8})',
        "ProblemError",
        "LoRA.from_peft takes a peft.LoraConfig, got dict",
        "LoraConfig(**options)",
    ),
    (
        "a PEFT option that LoRA has not",
        (
            "from peft import LoraConfig\n"
            'mf.LoRA.from_peft(LoraConfig(target_modules=["up_proj"], use_dora=True))'
        ),
        "ProblemError",
        "LoRA.from_peft: {'use_dora': True} changes what is trained",
        "reset it to PEFT's default",
    ),
    (
        "a PEFT configuration without modules",
        ("from peft import LoraConfig\nmf.LoRA.from_peft(LoraConfig())"),
        "ProblemError",
        "LoRA.from_peft: target_modules=None",
        "name the modules, or pass 'all-linear'",
    ),
    (
        "full weights of nothing, saved",
        "mf.FullWeights(lambda model: ()).save(linear, {}, folder)",
        "PlacementError",
        "FullWeights.save: the placement is empty",
        "(place them on at least one module)",
    ),
]
