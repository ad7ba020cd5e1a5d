"""Whether a checkpoint's keys are the model's: the last step of `InternVLChatModel.from_pretrained`."""


def refuse_wrong_keys(name: str, info: dict) -> None:
    """Raises a ValueError that lists every missing, unexpected or mismatched key of checkpoint `name`.

    `info` is the loading report of transformers' `from_pretrained`; ours may have `not_finite_keys`, too.
    """
    kinds = ("missing", "unexpected", "mismatched", "not_finite")
    problems = {kind: sorted(info.get(f"{kind}_keys") or ()) for kind in kinds}
    problems["mismatched"] = [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in problems["mismatched"]]
    if any(problems.values()):
        listed = "\n".join(f"{kind.replace('_', ' ')}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{name} is no checkpoint of this model. Its keys:\n{listed}")
