"""Records of studies whose answer is planted in them."""

import numpy as np

LAW = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}


def loss_of(n, d):
    return LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


def arms(
    record,
    study="parts",
    seeds=5,
    shifts=(("llama", 0.0), ("alibi", 0.02), ("gelu", 0.0005)),
    scales=(None,),
    gain=1.0,
):
    """Named arms over paired seeds, as sweeps/parts.yaml makes them; losses by study, arm, seed."""
    rng, losses = np.random.default_rng(3), {}
    for scale in scales:
        between = 0.01 * rng.standard_normal(seeds)
        for arm, shift in shifts:
            for seed in range(seeds):
                tokens = scale or 1e7
                base = loss_of(1e6, tokens * (gain if shift else 1.0))
                loss = base + (shift if gain == 1.0 else 0.0) + between[seed] + 0.001 * rng.standard_normal()
                grid = [] if scale is None else [f"budget.tokens={scale:g}"]
                overrides = [*grid, f"seed={seed}", f"arm={arm}", f"pos={arm}"]
                name = f"{arm}-{seed}-{tokens:g}"
                record(study, name, overrides, loss=loss, tokens=tokens, seed=seed, arm=arm)
                losses[scale, arm, seed] = loss
    return losses


def sizes(record, study="sizes", seeds=1, noise=0.002, n=6, **changed):
    rng = np.random.default_rng(0)
    for i, params in enumerate(np.geomspace(1e5, 1e7, n)):
        for j, tokens in enumerate(np.geomspace(1e6, 1e9, 5)):
            for seed in range(seeds):
                loss = loss_of(params, tokens) * np.exp(noise * rng.standard_normal())
                overrides = [
                    f"budget.tokens={tokens:g}",
                    f"seed={seed}",
                    f"arm=d{i}",
                    f"model.d_model={i}",
                    f"lr={1e-3 / (i + 1)}",
                ]
                record(
                    study,
                    f"{i}-{j}-{seed}",
                    overrides,
                    loss=loss,
                    params=params,
                    tokens=tokens,
                    seed=seed,
                    arm=f"d{i}",
                    **changed,
                )
