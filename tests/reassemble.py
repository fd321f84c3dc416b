"""The inverse of corruption, written without a look at it: what the tests hold its results against."""

from collections.abc import Sequence

from vikhr_t5.data.denoisers import Codes


def reassemble(inputs: Sequence[int], targets: Sequence[int], codes: Codes) -> tuple[list[int], list[list[int]]]:
    """The window's tokens and its hidden spans, in order. Asserts all that makes a pair well formed."""
    inputs, targets = [int(i) for i in inputs], [int(i) for i in targets]
    assert inputs.pop() == codes.eos
    assert targets.pop() == codes.eos
    if inputs and inputs[0] in codes.modes.values():
        del inputs[0]

    def is_sentinel(token: int) -> bool:
        return codes.first_sentinel - codes.num_sentinels < token <= codes.first_sentinel

    assert all(token <= codes.first_sentinel and token not in (0, codes.eos) for token in inputs + targets)
    spans: list[list[int]] = []
    if not is_sentinel(targets[0]):  # a prefix: the targets go on where the inputs end
        assert not any(map(is_sentinel, inputs + targets))
        return inputs + targets, [targets]
    for token in targets:
        if is_sentinel(token):
            assert token == codes.first_sentinel - len(spans), "sentinels descend one by one, without a gap"
            spans.append([])
        else:
            spans[-1].append(token)
    text: list[int] = []
    used = 0
    for previous, token in zip([None, *inputs], inputs, strict=False):
        if is_sentinel(token):
            assert token == codes.first_sentinel - used
            assert previous is None or not is_sentinel(previous), "a kept token stands between two spans"
            assert spans[used], "no span is empty"
            text += spans[used]
            used += 1
        else:
            text.append(token)
    assert used == len(spans)
    return text, spans
